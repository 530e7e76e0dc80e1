"""One examination of a phantom patient: how the scan is taken, and the patient painted on its voxels in HU.

Organs are painted one over the other with edges one voxel wide, and the labels follow the lungs, their disease and the
airways.
"""

from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from fibldm.phantoms.anatomy import APEX_MM, Anatomy, Tubes, ellipsoid

AIR, FAT, MUSCLE, BLOOD, LUMEN = -1000, -95, 50, 42, -965


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
        spacing: millimetres along the patient's x, y, z; 4.5 to 5.5 each where None.
        orientation: axis codes of the stored axes, such as ``"LPS"``; mostly LPS, LAS or RAS where None.
    """
    field = rng.uniform(285, 314, 3)
    field[0] = min(max(field[0], 2 * (anatomy.width + 15 + anatomy.fat) + 14), 314)
    drawn = np.maximum(rng.uniform(4.5, 5.5, 3), field / 64)
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
        points[2] = APEX_MM - (APEX_MM - points[2]) / self.breath
        return points

    def deflated(self, tubes: Tubes) -> Tubes:
        """Tubes of the inflated lung at this scan's inspiration."""
        scale, shift = (1, 1, self.breath), (0, 0, APEX_MM * (1 - self.breath))
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
