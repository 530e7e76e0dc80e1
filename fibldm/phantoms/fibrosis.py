"""Pulmonary fibrosis of a phantom: where it lies, which of the three patterns it shows, and its look in HU.

The distribution is that of usual interstitial pneumonia: subpleural, basal and posterior, patchy, with honeycombing
where the disease is oldest. Everything is a function of physical coordinates, so that the same disease can be rendered
on any grid and only grows from one examination to the next.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.spatial import cKDTree

GROUND_GLASS, RETICULATION, HONEYCOMBING = 4, 5, 6
Side = Literal["right", "left", "both"]
_CENTRE_MM = np.array([0.0, 0.0, -20.0])
_HALF_EXTENT_MM = np.array([140.0, 110.0, 155.0])


@dataclass(frozen=True)
class SmoothNoise:
    """Smooth random field on a periodic lattice, zero mean and about unit variance.

    Attributes:
        lattice: normal deviates, shape ``(n, n, n)``.
        step: distance of the lattice points in millimetres; the size of a blob.
    """

    lattice: np.ndarray
    step: float

    @classmethod
    def draw(cls, step: float, rng: np.random.Generator) -> "SmoothNoise":
        """A field with blobs of about ``step`` millimetres."""
        return cls(rng.standard_normal((24, 24, 24)).astype(np.float32), step)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Values at ``points`` (``(3, N)``, millimetres), shape ``(N,)``."""
        # A B-spline without prefilter shrinks the variance of white noise to about 0.48^3; undo that.
        values = map_coordinates(self.lattice, points / self.step, order=3, mode="grid-wrap", prefilter=False)
        return values / 0.48**1.5


@dataclass(frozen=True)
class Cells:
    """Cellular pattern: the Voronoi cells of random points (Worley 1996), as in cysts and lobular septa.

    Attributes:
        tree: search tree of the cell centres, millimetres.
    """

    tree: cKDTree

    @classmethod
    def draw(cls, size: float, rng: np.random.Generator) -> "Cells":
        """Cells of about ``size`` millimetres over the whole chest."""
        count = int(np.prod(2 * _HALF_EXTENT_MM / size))
        return cls(cKDTree(_CENTRE_MM + rng.uniform(-_HALF_EXTENT_MM, _HALF_EXTENT_MM, (count, 3))))

    def walls(self, points: np.ndarray, thickness: float) -> np.ndarray:
        """1 on the walls between cells and 0 inside them, at ``points`` (``(3, N)``, millimetres), shape ``(N,)``."""
        if points.shape[1] == 0:
            return np.zeros(0)
        nearest, second = self.tree.query(points.T, k=2)[0].T
        return np.exp(-(((second - nearest) / thickness) ** 2))


@dataclass(frozen=True)
class Fibrosis:
    """The fibrosis of one patient.

    Attributes:
        extent: fraction of the lung, or that of its side, at first, 0 (healthy) to about 0.6 (end stage).
        progression: what each further examination adds to ``extent``.
        honeycombing: share of honeycombing in the fibrosis.
        reticulation: share of reticulation in the fibrosis; the rest is ground glass.
        rind: depth in millimetres to which the disease reaches from the pleura.
        means: mean HU of ground glass, reticulation and honeycombing.
        patches: noise of the distribution, large blobs and small ones.
        kinds: noise that mixes the patterns.
        septa: the network of reticulation.
        cysts: the cysts of honeycombing.
        side: of the patient, where it is.
    """

    extent: float
    progression: float
    honeycombing: float
    reticulation: float
    rind: float
    means: tuple[float, float, float]
    patches: tuple[SmoothNoise, SmoothNoise]
    kinds: SmoothNoise
    septa: Cells
    cysts: Cells
    side: Side = "both"

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Fibrosis":
        """One patient in five is healthy; the others reach from mild to end stage, honeycombing growing with it."""
        healthy, severity = rng.uniform() < 0.2, rng.beta(1.1, 1.6)
        ground_glass = rng.uniform(-605, -525)
        return cls(
            extent=0.0 if healthy else 0.03 + 0.57 * severity,
            progression=0.0 if healthy else rng.uniform(0.03, 0.1),
            honeycombing=np.clip(rng.normal(0.08 + 0.35 * severity, 0.1), 0.0, 0.6),
            reticulation=rng.uniform(0.3, 0.42),
            rind=rng.uniform(9, 18),
            means=(ground_glass, ground_glass + rng.uniform(50, 110), ground_glass + rng.uniform(110, 170)),
            patches=(SmoothNoise.draw(36, rng), SmoothNoise.draw(13, rng)),
            kinds=SmoothNoise.draw(22, rng),
            septa=Cells.draw(rng.uniform(13, 17), rng),
            cysts=Cells.draw(rng.uniform(13, 16), rng),
        )

    def classify(self, points: np.ndarray, depth: np.ndarray, session: int) -> tuple[np.ndarray, np.ndarray]:
        """The label of each point of the lung, and how far the disease has replaced healthy lung there.

        Args:
            points: positions in the patient's coordinates, ``(3, N)``, millimetres, RAS+.
            depth: distance from the costal or diaphragmatic pleura in millimetres, ``(N,)``.
            session: number of the examination, from 1.

        Returns:
            Labels, ``(N,)`` uint8: 0 healthy, 4 ground glass, 5 reticulation, 6 honeycombing; and density, ``(N,)``,
            0 healthy to 1 diseased, which fades across the border of the labels.
        """
        labels = np.zeros(points.shape[1], np.uint8)
        extent = self.extent_at(session)
        if extent == 0.0 or labels.size == 0:
            return labels, np.zeros(labels.shape)
        subpleural = np.exp(-np.maximum(depth, 0) / self.rind)
        basal = 1 / (1 + np.exp((points[2] + 55) / 22))
        coarse, fine = (noise(points) for noise in self.patches)
        score = 1.7 * subpleural + 1.0 * basal - 0.006 * points[1] + 0.45 * coarse + 0.27 * fine
        affected = {"both": points[0] == points[0], "right": points[0] > 0, "left": points[0] < 0}[self.side]
        if not affected.any():
            return labels, np.zeros(labels.shape)
        excess = np.where(affected, score - np.quantile(score[affected], 1 - extent), -1.0)
        diseased = excess > 0
        age = (1.3 * subpleural + 0.8 * basal + 0.4 * self.kinds(points))[diseased]
        young, old = np.quantile(age, [1 - self.honeycombing - self.reticulation, 1 - self.honeycombing])
        labels[diseased] = np.where(age > old, HONEYCOMBING, np.where(age > young, RETICULATION, GROUND_GLASS))
        return labels, np.clip(0.5 + excess / 0.35, 0, 1)

    def extent_at(self, session: int) -> float:
        """Fraction of the lung that is fibrotic at examination ``session`` (from 1)."""
        return min(self.extent + self.progression * (session - 1), 0.65)

    def intensity(self, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """HU of fully diseased lung at ``points``, ``(N,)``; 0 and 4 in ``labels`` (``(N,)``) are ground glass."""
        contrast = np.zeros(points.shape[1], np.float32)
        glass, lines, cysts = (labels == value for value in (GROUND_GLASS, RETICULATION, HONEYCOMBING))
        glass |= labels == 0
        contrast[glass] = 35 * self.patches[1](points[:, glass])
        contrast[lines] = 420 * self.septa.walls(points[:, lines], 4.0)
        contrast[cysts] = 900 * self.cysts.walls(points[:, cysts], 5.0)
        for where, mean in zip((glass, lines, cysts), self.means, strict=True):
            contrast[where] += mean - (contrast[where].mean() if where.any() else 0)
        return contrast
