"""Procedural chest CT with pulmonary fibrosis: data to learn, test and demonstrate with, without network or patient.

A patient is a set of shapes in millimetres in the patient's own RAS+ coordinates (origin in the middle of the chest);
a scan renders them on a grid of its own, with its own inspiration, pose, noise and progress of the disease. Anatomy is
keyed by (seed, subject) and a scan by (seed, subject, session): a patient is the same whatever the number of patients.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.ndimage import gaussian_filter

from fibldm.errors import FibldmError
from fibldm.files import atomic_path, read_json, write_json
from fibldm.volumes.phantom_fibrosis import Fibrosis, SmoothNoise

LABELS: dict[int, str] = {
    0: "background",
    1: "right lung",
    2: "left lung",
    3: "airways",
    4: "ground glass",
    5: "reticulation",
    6: "honeycombing",
}
AIR, FAT, MUSCLE, BLOOD, LUMEN = -1000, -95, 50, 42, -965
_APEX_MM = 115.0
_GENERATOR = 1  # Count up whenever the same seed gives other voxels.


@dataclass(frozen=True)
class Phantom:
    """One synthetic chest CT.

    Attributes:
        volume: int16 HU, shape ``(X, Y, Z)`` of the stored orientation (not always RAS+), within [-1024, 3071].
        labels: uint8 of the same shape, values of ``LABELS``; vessels inside the lung belong to the lung.
        affine: voxel indices (centres) to RAS+ millimetres, 4x4.
        subject: ``sub-0001`` and so on.
        session: ``ses-1`` and so on, or None where the patient has one examination only.
        extent: fraction of the lung (airways left out) that is labelled fibrotic.
    """

    volume: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    subject: str
    session: str | None
    extent: float

    @property
    def name(self) -> str:
        """File name without suffix, such as ``sub-0012_ses-1``."""
        return self.subject if self.session is None else f"{self.subject}_{self.session}"


@dataclass(frozen=True)
class Tubes:
    """Straight tubes with round ends: vessels, airways, bones.

    Attributes:
        start, end: axis points, ``(N, 3)`` millimetres.
        radius: ``(N,)`` millimetres.
    """

    start: np.ndarray
    end: np.ndarray
    radius: np.ndarray

    @classmethod
    def along(cls, points: Sequence[Sequence[float]], radius: float) -> "Tubes":
        """One tube of constant radius through ``points``."""
        line = np.asarray(points, float)
        return cls(line[:-1], line[1:], np.full(len(line) - 1, radius))

    @classmethod
    def join(cls, *parts: "Tubes") -> "Tubes":
        """All tubes of ``parts``."""
        columns = zip(*((part.start, part.end, part.radius) for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def where(self, chosen: np.ndarray) -> "Tubes":
        """The tubes for which ``chosen`` (bool, ``(N,)``) holds."""
        return Tubes(self.start[chosen], self.end[chosen], self.radius[chosen])


def grow_tree(root: np.ndarray, targets: np.ndarray, radius: float, rng: np.random.Generator) -> Tubes:
    """A tree from ``root`` that reaches every target, splitting the targets in two at each branching.

    Radii nearly follow Murray's law (doi:10.1073/pnas.12.3.207), ``radius**3`` proportional to flow; the exponent here
    is 2.7, as measured in lungs, and the flow is the number of targets fed.

    Args:
        root: ``(3,)`` millimetres.
        targets: ``(N, 3)`` millimetres.
        radius: of the trunk, millimetres.
        rng: bends the branches.
    """
    tubes: list[tuple[np.ndarray, np.ndarray, float]] = []
    waiting = [(root, targets)]
    while waiting:
        point, fed = waiting.pop()
        calibre = radius * (len(fed) / len(targets)) ** (1 / 2.7)
        if len(fed) == 1:
            tubes.append((point, fed[0], calibre))
            continue
        reach = fed.mean(0) - point
        fork = point + 0.45 * reach + rng.normal(0, 0.06, 3) * np.linalg.norm(reach)
        tubes.append((point, fork, calibre))
        along = (fed - fork) @ np.linalg.eigh(np.cov(fed.T))[1][:, -1]
        order, cut = np.argsort(along), max(1, int(len(fed) * rng.uniform(0.35, 0.65)))
        waiting += [(fork, fed[order[:cut]]), (fork, fed[order[cut:]])]
    start, end, calibres = (np.array(column) for column in zip(*tubes, strict=True))
    return Tubes(start, end, calibres)


def smooth_max(*distances: np.ndarray, rounding: float = 9.0) -> np.ndarray:
    """Intersection of shapes given by signed distances, its edges rounded off by about ``rounding`` millimetres."""
    result = distances[0]
    for distance in distances[1:]:
        overlap = np.maximum(rounding - np.abs(result - distance), 0)
        result = np.maximum(result, distance) + overlap**2 / (4 * rounding)
    return result


def ellipsoid(points: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Signed distance in millimetres (first order; negative inside) from an ellipsoid with axes along x, y, z."""
    scaled = [(points[axis] - centre[axis]) / radii[axis] for axis in range(3)]
    return (np.sqrt(scaled[0] ** 2 + scaled[1] ** 2 + scaled[2] ** 2) - 1) * min(radii)


def oval(x: np.ndarray, y: np.ndarray, width: np.ndarray | float, depth: np.ndarray | float) -> np.ndarray:
    """Signed distance in millimetres, along rays from the centre, from a rounded rectangle with these half axes."""
    fraction = ((np.abs(x) / width) ** 2.4 + (np.abs(y) / depth) ** 2.4) ** (1 / 2.4)
    return np.sqrt(x**2 + y**2) * (1 - 1 / np.maximum(fraction, 1e-3))


@dataclass(frozen=True)
class Anatomy:
    """One patient: sizes in millimetres, RAS+ coordinates with the origin in the middle of the chest.

    Attributes:
        width, depth: half axes of the thoracic cavity.
        fat: thickness of the fat under the skin.
        domes: height z of the right and the left dome of the diaphragm.
        heart: radii of the heart.
        kyphosis: curvature of the spine, 1/mm.
        rib_pitch, rib_slope: distance of neighbouring ribs, and their fall per millimetre towards the front.
        aeration: mean HU of the healthy lung.
        gas: radius of the gas bubble in the stomach, 0 for none.
        aorta, veins, trachea, bronchi, vessels: the tubes; ``bronchi`` and ``vessels`` lie in the lungs.
        texture: fine structure of the healthy lung.
        fibrosis: the disease.
    """

    width: float
    depth: float
    fat: float
    domes: tuple[float, float]
    heart: tuple[float, float, float]
    kyphosis: float
    rib_pitch: float
    rib_slope: float
    aeration: float
    gas: float
    aorta: Tubes
    veins: Tubes
    trachea: Tubes
    bronchi: Tubes
    vessels: Tubes
    texture: SmoothNoise
    fibrosis: Fibrosis

    def cavity(self, points: np.ndarray) -> np.ndarray:
        """Signed distance from the inside of the rib cage, which tapers towards the apex; open below."""
        rise = np.clip((points[2] + 45) / (_APEX_MM + 50), 0, 1)
        taper = np.sqrt(np.maximum(1 - rise**2.8, 4e-3))
        return oval(points[0], points[1], self.width * taper, self.depth * taper)

    def skin(self, points: np.ndarray) -> np.ndarray:
        """Signed distance from the skin."""
        rise = np.clip((points[2] - 40) / 130, 0, 1)
        taper = 1 - 0.28 * rise**2
        return oval(points[0], points[1], (self.width + 15 + self.fat) * taper, (self.depth + 15 + self.fat) * taper)

    def spine_front(self, z: np.ndarray) -> np.ndarray:
        """y of the middle of the vertebral bodies at height ``z``."""
        return -self.depth + 23 - self.kyphosis * ((z - 10) ** 2 - 4000)

    def diaphragm(self, points: np.ndarray, side: int) -> np.ndarray:
        """Signed distance from above the diaphragm (positive below it); ``side`` is 1 right, -1 left."""
        across = ((points[0] - side * 0.5 * self.width) / 75) ** 2 + ((points[1] - 8) / 80) ** 2
        top = self.domes[0] if side > 0 else self.domes[1]
        return (np.maximum(top - 48 * across, top - 72) - points[2]) * 0.8

    def lung(self, points: np.ndarray, side: int) -> np.ndarray:
        """Signed distance from one lung; ``side`` is 1 right, -1 left."""
        x, y, z = points
        hilum = np.exp(-(((z - 8) / 40) ** 2))
        midline = 5 + (19 + 7 * hilum) * np.exp(-(((y + 5) / 40) ** 2)) - side * x
        heart = -ellipsoid(points, self.heart_centre, [radius + 4 for radius in self.heart])
        spine = 25 - np.hypot(x, y - self.spine_front(z))
        cava, aorta = 13 - np.hypot(x - 23, y - 12), 16 - np.hypot(x + 24, y + 40) - 0.2 * np.maximum(z - 30, 0)
        vessel = cava if side > 0 else aorta
        return smooth_max(self.cavity(points), self.diaphragm(points, side), midline, heart, spine, vessel)

    def pleural_depth(self, points: np.ndarray) -> np.ndarray:
        """Distance from the costal or diaphragmatic pleura, millimetres."""
        below = np.where(points[0] > 0, self.diaphragm(points, 1), self.diaphragm(points, -1))
        return -np.maximum(self.cavity(points), below)

    @property
    def heart_centre(self) -> tuple[float, float, float]:
        """Middle of the heart: left of the midline, in front, on the diaphragm."""
        return (-0.17 * self.width, 0.25 * self.depth, self.domes[1] + 0.75 * self.heart[2])


def count_sessions(seed: int, subject: int) -> int:
    """How many examinations the patient has: two for about one in six, else one."""
    return 1 + int(np.random.default_rng([seed, subject]).uniform() < 1 / 6)


def draw_anatomy(seed: int, subject: int) -> Anatomy:
    """The patient ``subject`` (from 1) of the phantoms with this seed."""
    rng = np.random.default_rng([seed, subject])
    rng.uniform()  # That of count_sessions; the number of examinations must not depend on the anatomy.
    right = rng.uniform(-74, -58)
    anatomy = Anatomy(
        width=rng.uniform(106, 122),
        depth=rng.uniform(76, 92),
        fat=rng.gamma(3, 2.5) + 4,
        domes=(right, right - rng.uniform(6, 16)),
        heart=(rng.uniform(50, 60), rng.uniform(38, 46), rng.uniform(38, 46)),
        kyphosis=rng.uniform(0.0001, 0.0006),
        rib_pitch=rng.uniform(21, 25),
        rib_slope=rng.uniform(0.3, 0.5),
        aeration=rng.uniform(-895, -850),
        gas=max(0.0, rng.uniform(-20, 13)),
        texture=SmoothNoise.draw(9, rng),
        fibrosis=Fibrosis.draw(rng),
        **_great_tubes(rng),
    )
    return _with_trees(anatomy, rng)


def _great_tubes(rng: np.random.Generator) -> dict[str, Tubes]:
    """Aorta, great veins with the pulmonary trunk, and trachea with the main bronchi; the trees are still empty."""
    a, b = rng.uniform(-5, 5, 2)
    nothing = Tubes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0))
    arch = [(4, 20, -30), (14, 22, 5), (10, 18, 32), (-4, 2, 47 + a), (-18, -20, 42 + a), (-24, -36, 22)]
    aorta = Tubes.along([*arch, (-25, -44, -20), (-20, -46, -80), (-8, -44, -180)], rng.uniform(11, 15))
    trunk = [(-14, 32, -28), (-16, 22, 2), (-8, 6, 10)]
    veins = Tubes.join(
        Tubes.along([(22, 12, -25), (24, 12, 40), (20, 10, 75), (32, 6, 112)], rng.uniform(7, 10)),
        Tubes.along([(20, 12, 75), (-24, 14, 88), (-34, 4, 112)], 6),
        Tubes.along([*trunk, (12, 2, 6), (38, -6, 0)], rng.uniform(10, 13)),
        Tubes.along([(-8, 6, 10), (-28, -6, 12), (-40, -14, 4)], rng.uniform(9, 11)),
        Tubes.along([(-20, -4, 50), (-26, -6, 112)], 5),
        Tubes.along([(12, 6, 46), (22, 0, 112)], 5),
    )
    carina = (2 + 0.4 * b, -12, 14 + b)
    windpipe = Tubes.along([(0, -4, 220), (1, -2, 100), (3, -8, 55), carina], rng.uniform(8.5, 10.5))
    mains = [Tubes.along([carina, (side * 24, -14, 1 + side + b), (side * 42, -16, -13)], 7) for side in (1, -1)]
    trachea = Tubes.join(windpipe, *mains)
    return {"aorta": aorta, "veins": veins, "trachea": trachea, "bronchi": nothing, "vessels": nothing}


def _with_trees(anatomy: Anatomy, rng: np.random.Generator) -> Anatomy:
    """``anatomy`` with arteries, veins and bronchi grown into both lungs from their hila."""
    vessels, bronchi = [], []
    for side in (1, -1):
        low, high = (0, -anatomy.depth, -150), (anatomy.width, anatomy.depth, _APEX_MM)
        seeds = rng.uniform(low, high, (4000, 3)) * (side, 1, 1)
        inside = seeds[anatomy.lung(seeds.T, side) < -7][:300]
        half, most = len(inside) // 2, len(inside) * 7 // 8
        hilum = np.array([side * 40.0, -8.0, 2.0])
        vessels.append(grow_tree(hilum, inside[:half], rng.uniform(5.6, 6.8), rng))
        vessels.append(grow_tree(hilum + (0, 6, -16), inside[half:most], rng.uniform(4.8, 6), rng))
        bronchi.append(grow_tree(np.array([side * 42.0, -16.0, -12.0]), inside[most:], rng.uniform(4.6, 5.6), rng))
    airways = Tubes.join(*bronchi)
    heart = ellipsoid((airways.start + airways.end).T / 2, anatomy.heart_centre, anatomy.heart)
    return replace(anatomy, vessels=Tubes.join(*vessels), bronchi=airways.where(heart > 8))


@dataclass(frozen=True)
class Scan:
    """How one examination differs from another of the same patient.

    Attributes:
        affine: voxel indices to RAS+ millimetres of the scanner, 4x4, axes in the stored orientation.
        shape: voxels along the stored axes.
        pose: RAS+ millimetres of the scanner to the patient's coordinates, 4x4.
        breath: height of the lungs over that at full inspiration.
        enhancement: HU that contrast medium adds to blood.
        noise: standard deviation in HU.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    pose: np.ndarray
    breath: float
    enhancement: float
    noise: float

    @property
    def spacing(self) -> float:
        """Geometric mean of the voxel's edges, millimetres."""
        return float(abs(np.linalg.det(self.affine)) ** (1 / 3))


def draw_scan(
    anatomy: Anatomy,
    rng: np.random.Generator,
    *,
    session: int = 1,
    spacing: tuple[float, float, float] | None = None,
    orientation: str | None = None,
) -> Scan:
    """An examination of ``anatomy``.

    Args:
        anatomy: the patient.
        rng: draws everything that is not given.
        session: number of the examination, from 1; a stiffer lung breathes in less.
        spacing: millimetres along the patient's x, y, z; 4.4 to 5.6 each where None.
        orientation: axis codes of the stored axes, such as ``"LPS"``; mostly LPS, LAS or RAS where None.
    """
    field = rng.uniform(300, 350, 3)
    field[0] = max(field[0], 2 * (anatomy.width + 15 + anatomy.fat) + 14)
    drawn = np.clip(rng.uniform(4.4, 5.6, 3), field / 74, field / 58)
    edges = drawn if spacing is None else np.array(spacing, float)
    codes = orientation or rng.choice(["LPS", "LAS", "RAS", _any_orientation(rng)], p=[0.35, 0.2, 0.2, 0.25])
    stored = nib.orientations.axcodes2ornt(codes)
    axes, signs = stored[:, 0].astype(int), stored[:, 1]
    shape = np.ceil(field / edges).astype(int)[axes]
    centre = rng.uniform((-15, -180, -400), (15, -60, 200))
    affine = np.eye(4)
    affine[:3, :3] = 0
    affine[axes, range(3)] = signs * edges[axes]
    affine[:3, 3] = centre - affine[:3, :3] @ (shape - 1) / 2
    stiffness = 0.1 * anatomy.fibrosis.extent_at(session)
    return Scan(
        affine=affine,
        shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        pose=_draw_pose(centre, rng),
        breath=rng.uniform(0.94, 1.0) - stiffness,
        enhancement=rng.uniform(60, 170) if rng.uniform() < 0.3 else 0.0,
        noise=rng.uniform(10, 30),
    )


def _any_orientation(rng: np.random.Generator) -> str:
    """One of the 48 axis codes."""
    pairs = rng.permutation(["RL", "AP", "SI"])
    return "".join(pair[rng.integers(2)] for pair in pairs)


def _draw_pose(centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scanner to patient: a turn of a few degrees about each axis, and a shift of a few millimetres."""
    x, y, z = np.deg2rad(rng.normal(0, 1.5, 3).clip(-3, 3))
    pose = np.eye(4)
    pose[:3, :3] = np.linalg.qr(np.array([[1, -z, y], [z, 1, -x], [-y, x, 1]]))[0]
    pose[:3, :3] *= np.sign(np.diag(pose[:3, :3]))
    pose[:3, 3] = rng.uniform((-3, -5, -14), (3, 5, -6)) - pose[:3, :3] @ centre
    return pose


class Canvas:
    """HU of one scan while organ after organ is painted over it, with soft edges one voxel wide.

    Attributes:
        hu: float32, shape ``(X, Y, Z)`` of the stored orientation.
        points: the patient's coordinates of every voxel, ``(3, X, Y, Z)`` millimetres.
        voxel: edge of a voxel, millimetres.
    """

    def __init__(self, scan: Scan) -> None:
        self.to_patient = scan.pose @ scan.affine
        self.breath, self.voxel = scan.breath, scan.spacing
        index = np.ogrid[tuple(slice(size) for size in scan.shape)]
        rows = self.to_patient.astype(np.float32)
        self.points = np.stack([row[0] * index[0] + row[1] * index[1] + row[2] * index[2] + row[3] for row in rows[:3]])
        self.hu = np.full(scan.shape, AIR, np.float32)

    def soft(self, distance: np.ndarray) -> np.ndarray:
        """How much of a voxel lies inside a shape, from the signed distance of its centre (negative inside)."""
        return np.clip(0.5 - distance / self.voxel, 0, 1)

    def paint(self, coverage: np.ndarray, hu: np.ndarray | float) -> None:
        """Put tissue of ``hu`` where ``coverage`` (0 to 1) says."""
        self.hu += coverage * (hu - self.hu)

    def inflated(self) -> np.ndarray:
        """``points`` in the lung at full inspiration, where the anatomy is defined: stretched down from the apex."""
        points = self.points.copy()
        points[2] = _APEX_MM - (_APEX_MM - points[2]) / self.breath
        return points

    def deflated(self, tubes: Tubes) -> Tubes:
        """Tubes of the inflated lung at this scan's inspiration."""
        scale, shift = (1, 1, self.breath), (0, 0, _APEX_MM * (1 - self.breath))
        return Tubes(tubes.start * scale + shift, tubes.end * scale + shift, tubes.radius)

    def voxels(self, points: np.ndarray) -> np.ndarray:
        """Voxel coordinates of ``points`` (``(N, 3)``, patient's millimetres), ``(N, 3)``."""
        inverse = np.linalg.inv(self.to_patient)
        return points @ inverse[:3, :3].T + inverse[:3, 3]

    def tubes(self, tubes: Tubes) -> np.ndarray:
        """Coverage of tubes; one thinner than a voxel covers what its cross-section does."""
        coverage = np.zeros_like(self.hu)
        ends = np.stack([self.voxels(tubes.start), self.voxels(tubes.end)])
        margin = (tubes.radius[:, None] + self.voxel) / np.linalg.norm(self.to_patient[:3, :3], axis=0)
        low = np.maximum(np.floor(ends.min(0) - margin), 0).astype(int)
        high = np.maximum(np.ceil(ends.max(0) + margin) + 1, 0).astype(int)
        for start, end, radius, first, last in zip(tubes.start, tubes.end, tubes.radius, low, high, strict=True):
            box = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
            distance = _distance_to_segment(self.points[(slice(None), *box)], start, end)
            thin = min(1.0, np.pi * (radius / self.voxel) ** 2)
            np.maximum(coverage[box], thin * self.soft(distance - radius), out=coverage[box])
        return coverage

    def threads(self, tubes: Tubes, samples: int = 10) -> np.ndarray:
        """Coverage of tubes thinner than a voxel: their volume, shared out among the eight nearest voxels."""
        steps = (np.arange(samples) + 0.5) / samples
        along = tubes.start[:, None] + steps[:, None] * (tubes.end - tubes.start)[:, None]
        length = np.linalg.norm(tubes.end - tubes.start, axis=1)
        volume = np.repeat(np.pi * tubes.radius**2 * length / samples / self.voxel**3, samples)
        positions = self.voxels(along.reshape(-1, 3))
        base = np.floor(positions).astype(int)
        coverage = np.zeros_like(self.hu)
        for corner in np.ndindex(2, 2, 2):
            at = base + corner
            share = volume * np.prod(1 - np.abs(positions - at), axis=1)
            inside = np.all((at >= 0) & (at < coverage.shape), axis=1)
            np.add.at(coverage, tuple(at[inside].T), share[inside])
        return np.minimum(coverage, 1)


def _distance_to_segment(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of ``points`` (``(3, ...)``) from the segment between two points, millimetres."""
    axis = end - start
    offset = points - start.reshape(3, 1, 1, 1).astype(np.float32)
    along = np.clip(np.tensordot(axis / max(axis @ axis, 1e-9), offset, 1), 0, 1).astype(np.float32)
    return np.sqrt(sum((offset[i] - axis[i].astype(np.float32) * along) ** 2 for i in range(3)))


def _paint_trunk(canvas: Canvas, anatomy: Anatomy, cavity: np.ndarray) -> None:
    """Fat, the muscle of the chest wall with its fat planes, and the fat of the mediastinum."""
    skin = anatomy.skin(canvas.points)
    canvas.paint(canvas.soft(skin), FAT)
    x, y, _ = canvas.points
    plane = 0.45 * np.exp(-(((cavity - 9 - 2.5 * np.sin(x / 17) - 2 * np.sin(y / 13)) / 2.2) ** 2))
    canvas.paint(canvas.soft(skin + anatomy.fat), MUSCLE - 130 * plane)
    canvas.paint(canvas.soft(cavity), FAT + 15)


def _paint_abdomen(canvas: Canvas, anatomy: Anatomy, cavity: np.ndarray, inflated: np.ndarray) -> None:
    """Liver on the right; stomach with its gas, spleen and fat on the left; all below the diaphragm."""
    x, y, z = canvas.points
    right, left = (canvas.soft(-anatomy.diaphragm(inflated, side) + 1) for side in (1, -1))
    top = anatomy.domes[1]
    below = canvas.soft(cavity + 2)
    canvas.paint(below * np.where(x > 0, right, left), FAT)
    liver = ellipsoid(canvas.points, (42, 6, top - 55), (0.85 * anatomy.width, 0.95 * anatomy.depth, 85))
    canvas.paint(below * right * canvas.soft(liver), 58)
    stomach = ellipsoid(canvas.points, (-50, 24, top - 42), (34, 36, 36))
    spleen = ellipsoid(canvas.points, (-78, -42, top - 38), (24, 34, 40))
    for organ, hu in ((stomach, 32), (spleen, 50)):
        canvas.paint(below * left * canvas.soft(organ), hu)
    if anatomy.gas > 4:
        canvas.paint(below * left * canvas.soft(ellipsoid(canvas.points, (-50, 40, top - 30), [anatomy.gas] * 3)), AIR)


def _paint_skeleton(canvas: Canvas, anatomy: Anatomy, cavity: np.ndarray) -> None:
    """Ribs with their cartilage, sternum, spine with discs and canal, shoulder blades and collar bones."""
    x, y, z = canvas.points
    height = z + anatomy.rib_slope * (y + anatomy.depth)
    number = np.round(height / anatomy.rib_pitch)
    fall = (height - number * anatomy.rib_pitch) / np.hypot(1, anatomy.rib_slope)
    rib = np.hypot((cavity - 6) / 3.4, fall / 6.2) - 1
    present = canvas.soft(rib * 4) * (np.abs(number) < 6) * (np.hypot(x, y + anatomy.depth) > 18)
    canvas.paint(present, np.where((np.abs(x) < 60) & (y > 0.55 * anatomy.depth), 110, 330))
    sternum = np.maximum(np.abs(x) - 16, np.maximum(np.abs(cavity - 6) - 4, np.abs(z - 20) - 75))
    canvas.paint(canvas.soft(sternum), 190)
    back = y - anatomy.spine_front(z)
    disc = canvas.soft(np.abs((z + 5) % 25 - 12.5) - 3.5)
    canvas.paint(canvas.soft(np.hypot(x / 17, back / 15) * 15 - 15), 210 - 120 * disc)
    arch = np.maximum(np.hypot(x / 19, (back + 20) / 13) * 13 - 13, np.abs((z + 5) % 25 - 12.5) - 9)
    spinous = np.maximum(np.maximum(np.abs(x) - 4, np.abs(back + 33) - 7), np.abs((z + 5) % 25 - 12.5) - 8)
    canvas.paint(canvas.soft(np.minimum(arch, spinous)), 280)
    canvas.paint(canvas.soft(np.hypot(x, back + 21) - 7), 30)
    blade = np.maximum(np.abs(cavity - 14) - 2.5, ellipsoid(canvas.points, (0, -90, 62), (200, 60, 58)))
    canvas.paint(canvas.soft(np.maximum(blade, 48 - np.abs(x))), 300)
    collar = [Tubes.along([(s * 16, 66, 92), (s * 60, 55, 108), (s * 105, 20, 122)], 5.5) for s in (1, -1)]
    canvas.paint(canvas.tubes(Tubes.join(*collar)), 320)


def _paint_mediastinum(canvas: Canvas, anatomy: Anatomy, inflated: np.ndarray, blood: float) -> None:
    """Heart with its muscle, and the great vessels."""
    heart = ellipsoid(inflated, anatomy.heart_centre, anatomy.heart)
    canvas.paint(canvas.soft(heart), 45)
    left, up, front = heart + 14, inflated[2] - anatomy.heart_centre[2], inflated[0] + 0.2 * inflated[1]
    chambers = np.maximum(left, 4 - np.abs(front - anatomy.heart_centre[0] + 0.3 * up))
    canvas.paint(canvas.soft(chambers), blood)
    canvas.paint(canvas.tubes(canvas.deflated(Tubes.join(anatomy.aorta, anatomy.veins))), blood)


def _healthy_lung(anatomy: Anatomy, points: np.ndarray, breath: float) -> np.ndarray:
    """HU of the healthy lung at ``points`` (``(3, N)``): denser in expiration, behind, and along the fissures."""
    oblique = (points[2] + 22 + 1.2 * points[1] - 0.004 * points[0] ** 2 + 20) / 1.56
    fissure = 55 * np.exp(-((oblique / 2) ** 2))
    dependent = -0.28 * (points[1] + 5)
    return anatomy.aeration + 300 * (1 - breath) + dependent + fissure + 11 * anatomy.texture(points)


def _paint_lungs(canvas: Canvas, anatomy: Anatomy, inflated: np.ndarray, session: int) -> np.ndarray:
    """Lungs with their disease; returns the labels 0, 1, 2, 4, 5, 6."""
    right, left = (canvas.soft(anatomy.lung(inflated, side)) for side in (1, -1))
    lung = np.maximum(right, left)
    where = lung > 0
    points = inflated[:, where]
    disease, density = anatomy.fibrosis.classify(points, anatomy.pleural_depth(points), session)
    share, behind = lung[where], canvas.hu[where]
    healthy = _healthy_lung(anatomy, points, canvas.breath)
    hu = healthy + density * (anatomy.fibrosis.intensity(points, disease) - healthy)
    canvas.hu[where] = behind + share * (hu - behind)
    # The rim belongs to the lung where healthy lung would be below -500 HU, which asks for more than half a voxel.
    rim = (share > 0.5) & (behind + share * (healthy - behind) < -510)
    labels = np.zeros(lung.shape, np.uint8)
    labels[where] = rim * np.where(disease > 0, disease, np.where(right > left, 1, 2)[where])
    return labels


def _paint_vessels(canvas: Canvas, anatomy: Anatomy, labels: np.ndarray, blood: float) -> None:
    """Vessels of the lung; the large ones at the hilum are taken out of ``labels``, as lung masks do."""
    vessels = canvas.deflated(anatomy.vessels)
    wide = vessels.radius > 2.6
    coverage = canvas.tubes(vessels.where(wide))
    canvas.paint(coverage, blood)
    canvas.paint(canvas.threads(vessels.where(~wide)), blood)
    labels[coverage > 0.45] = 0


def _paint_airways(canvas: Canvas, anatomy: Anatomy, labels: np.ndarray) -> None:
    """Trachea and bronchi, wall and lumen, widened where they run into fibrosis; the lumen becomes label 3."""
    bronchi = canvas.deflated(anatomy.bronchi)
    at = np.clip(np.round(canvas.voxels(bronchi.end)).astype(int), 0, np.array(labels.shape) - 1)
    traction = np.array([1.0, 1.0, 1.0, 1.0, 1.25, 1.7, 2.1])[labels[tuple(at.T)]]
    airways = Tubes.join(canvas.deflated(anatomy.trachea), replace(bronchi, radius=bronchi.radius * traction))
    wall = replace(airways, radius=airways.radius + 1.2)
    canvas.paint(canvas.tubes(wall), 10)
    lumen = canvas.tubes(airways)
    canvas.paint(lumen, LUMEN)
    labels[lumen > 0.5] = 3


def render(
    anatomy: Anatomy, scan: Scan, rng: np.random.Generator, *, session: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """One examination on the grid of ``scan``.

    Returns:
        int16 HU and uint8 labels, both ``(X, Y, Z)`` of the stored orientation.
    """
    canvas = Canvas(scan)
    inflated = canvas.inflated()
    cavity = anatomy.cavity(canvas.points)
    blood = BLOOD + scan.enhancement
    _paint_trunk(canvas, anatomy, cavity)
    _paint_abdomen(canvas, anatomy, cavity, inflated)
    _paint_mediastinum(canvas, anatomy, inflated, blood)
    labels = _paint_lungs(canvas, anatomy, inflated, session)
    _paint_skeleton(canvas, anatomy, cavity)
    _paint_vessels(canvas, anatomy, labels, blood)
    _paint_airways(canvas, anatomy, labels)
    hu = gaussian_filter(canvas.hu, 0.35) + _noise(scan, rng)
    return np.clip(np.round(hu), -1024, 3071).astype(np.int16), labels


def _noise(scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Noise correlated over about a voxel, as a reconstruction kernel leaves it, of the scan's deviation."""
    noise = gaussian_filter(rng.standard_normal(scan.shape, np.float32), 0.5, mode="wrap")
    return noise * (scan.noise / noise.std())


def make_phantom(
    seed: int,
    subject: int,
    session: int = 1,
    *,
    spacing: tuple[float, float, float] | None = None,
    orientation: str | None = None,
) -> Phantom:
    """One examination of one patient.

    Args:
        seed: of the whole set of phantoms.
        subject: number of the patient, from 1.
        session: number of the examination, from 1; later ones show the disease progressed.
        spacing: millimetres along the patient's x, y, z; drawn around 5 where None.
        orientation: axis codes of the stored axes, such as ``"LPS"``; drawn where None.
    """
    anatomy = draw_anatomy(seed, subject)
    rng = np.random.default_rng([seed, subject, session])
    scan = draw_scan(anatomy, rng, session=session, spacing=spacing, orientation=orientation)
    volume, labels = render(anatomy, scan, rng, session=session)
    return Phantom(
        volume=volume,
        labels=labels,
        affine=scan.affine,
        subject=f"sub-{subject:04d}",
        session=f"ses-{session}" if max(session, count_sessions(seed, subject)) > 1 else None,
        extent=float((labels > 3).sum() / np.isin(labels, (1, 2, 4, 5, 6)).sum()),
    )


def write_phantoms(
    out: Path,
    *,
    subjects: int,
    seed: int,
    progress: Callable[[Sequence[int]], Iterable[int]] | None = None,
) -> list[Path]:
    """Write phantoms as NIfTI: ``out/images``, ``out/labels`` (same names) and ``out/dataset.json``.

    An interrupted run goes on where it stopped: files are whole or absent, and ``dataset.json`` holds the recipe.

    Args:
        out: folder; made where absent.
        subjects: how many patients; about one in six has two examinations.
        seed: the same seed gives the same files.
        progress: wraps the numbers of the patients while they are written; a bar on standard error where None.

    Returns:
        The images, in the order of their names.

    Raises:
        FibldmError: ``subjects`` is below 1 or ``seed`` below 0, ``out`` holds other images, or the disk is full.
    """
    if subjects < 1:
        raise FibldmError(f"subjects must be at least 1, got {subjects}", "ask for one patient or more")
    if seed < 0:
        raise FibldmError(f"seed must be 0 or more, got {seed}", "give another seed")
    _claim(Path(out), {"generator": _GENERATOR, "seed": seed, "subjects": subjects})
    images: list[Path] = []
    for subject in (progress or _bar)(range(1, subjects + 1)):
        sessions = count_sessions(seed, subject)
        for session in range(1, sessions + 1):
            images.append(_write_examination(Path(out), seed, subject, session if sessions > 1 else None))
    return images


def _bar(subjects: Sequence[int]) -> Iterable[int]:
    return track(subjects, "Phantoms", console=Console(stderr=True))


def _claim(out: Path, recipe: dict[str, object]) -> None:
    """Write ``dataset.json`` first, so that no file ever lies in ``out`` without the recipe it was made with."""
    path, remedy = out / "dataset.json", "choose another folder, or delete this one"
    if path.exists():
        recorded = read_json(path).get("recipe")
        if recorded != recipe:
            raise FibldmError(f"{out} must hold phantoms made with {recipe}; {path.name} records {recorded}", remedy)
        return
    if any(out.glob("images/*")) or any(out.glob("labels/*")):
        raise FibldmError(f"{out} must be empty or hold phantoms, but has files and no {path.name}", remedy)
    write_json(
        path,
        {
            "name": "FibLDM phantoms",
            "description": "Procedural chest CT with pulmonary fibrosis; SYNTHETIC, made without any patient's data.",
            "modality": {"0": "CT"},
            "labels": {str(value): name for value, name in LABELS.items()},
            "licence": "CC0-1.0",
            "recipe": recipe,
        },
    )


def _write_examination(out: Path, seed: int, subject: int, session: int | None) -> Path:
    """Write image and labels of one examination unless both are there; returns the image."""
    name = f"sub-{subject:04d}" + (f"_ses-{session}" if session else "") + ".nii.gz"
    image, labels = out / "images" / name, out / "labels" / name
    if not (image.exists() and labels.exists()):
        phantom = make_phantom(seed, subject, session or 1)
        _write_nifti(image, phantom.volume, phantom.affine)
        _write_nifti(labels, phantom.labels, phantom.affine)
    return image


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    nifti = nib.Nifti1Image(array, affine)
    nifti.set_sform(affine, 1)
    nifti.set_qform(affine, 1)
    nifti.header.set_xyzt_units("mm")
    nifti.header["descrip"] = b"SYNTHETIC phantom"
    with atomic_path(path) as temporary:
        nib.save(nifti, temporary)
