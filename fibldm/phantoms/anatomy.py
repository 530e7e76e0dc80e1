"""One patient of the phantoms: a set of shapes in millimetres, in RAS+ with the origin in the middle of the chest.

Nothing here knows voxels. A shape is a signed distance, negative inside, at points of any shape ``(3, ...)``; vessels,
airways and thin bones are tubes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fibldm.phantoms.fibrosis import Fibrosis, SmoothNoise

APEX_MM = 115.0  # height z of the top of the lungs, which stays where it is while breathing


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
        rise = np.clip((points[2] + 45) / (APEX_MM + 50), 0, 1)
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
        low, high = (0, -anatomy.depth, -150), (anatomy.width, anatomy.depth, APEX_MM)
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
