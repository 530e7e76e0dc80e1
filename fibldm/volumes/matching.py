"""Which training scan a volume was made from, even if it was turned, mirrored, moved, scaled or retouched.

What tells patients apart is their detail (`fibldm.volumes.detail`). Training scans that may match are found in two
feature spaces that all turns and scales of a volume are looked up in:

* the amplitude spectrum of the detail, which a shift does not change;
* the coarse shape, at all small shifts.

The similarity of a volume and a scan is the correlation of their details where they overlap, the largest of all places
of those candidates. Correlations at all shifts at once are those of Padfield 2012, "Masked object registration in the
Fourier domain", equations 9 to 12, with weights in place of masks and without local means.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from fibldm.errors import FibldmError
from fibldm.files import atomic_path
from fibldm.volumes.detail import FREQUENCIES, LENGTHS, SHAPE, SIDE, Floats, Opened, Prepared, rounded
from fibldm.volumes.grid import Volume

METHOD = 2
"""Of the similarities; what was found by another one counts no more."""

_SCALES = (0.9, 0.925, 0.95, 0.975, 1.0, 1.025, 1.05, 1.075, 1.1)
_SHAPE_SCALES, _SHAPE_SHIFTS = (0.9, 1.0, 1.1), (-1, 0, 1)
_CANDIDATES = (8, 4)  # of spectrum and shape
_ALIGNED = 5  # of all places of the candidates
_OVERLAP = 0.6  # of the smaller volume, at least
_SHIFT = SIDE // 8  # at most


Kind = TypeVar("Kind", bound=np.generic)


class Turn(NamedTuple):
    """A permutation of the axes ``R, A, S``, and then which of them are mirrored (-1)."""

    axes: tuple[int, int, int] = (0, 1, 2)
    signs: tuple[int, int, int] = (1, 1, 1)

    def __call__(self, array: NDArray[Kind]) -> NDArray[Kind]:
        turned: NDArray[Kind] = array.transpose(self.axes)[tuple(slice(None, None, sign) for sign in self.signs)]
        return turned


_PERMUTATIONS = [(x, y, z) for x, y, z in itertools.permutations(range(3))]
_TURNS = [Turn(axes, (1, y, z)) for axes in _PERMUTATIONS for y, z in itertools.product((1, -1), repeat=2)]
"""Half of all 48: a spectrum is the same for a volume and for its mirror image in a point."""


class Transform(NamedTuple):
    """What makes the volume lie as the training scan does.

    Attributes:
        turn: of its axes.
        scale: by which it was larger.
        shift: mm along R, A, S, after the turn.
        inverted: whether bright and dark are swapped.
    """

    turn: Turn
    scale: float
    shift: tuple[float, float, float]
    inverted: bool

    def __str__(self) -> str:
        names, (axes, signs) = "RAS", self.turn
        said = [f"axes {''.join(names[axis] for axis in axes)}"] if axes != (0, 1, 2) else []
        said += [f"mirrored along {''.join(n for n, s in zip(names, signs, strict=True) if s < 0)}"] * (min(signs) < 0)
        said += [f"scaled by {self.scale:g}"] * (self.scale != 1)
        said += ["moved by {:.3g}, {:.3g}, {:.3g} mm".format(*self.shift)] * any(self.shift)
        return ", ".join([*said, *["inverted"] * self.inverted]) or "none"


class Match(NamedTuple):
    """The training scan that is most similar to a volume.

    Attributes:
        scan: place of the training scan among those that were given.
        similarity: in ``[0, 1]``.
        transform: at which it is so.
    """

    scan: int
    similarity: float
    transform: Transform


class Matcher:
    """Looks volumes up among training scans.

    Args:
        training: the scans in the cube, at least two.
        spacing: mm of a voxel of the cube.

    Raises:
        FibldmError: there are fewer than two scans.
    """

    def __init__(self, training: Sequence[Prepared], spacing: float) -> None:
        if len(training) < 2:
            raise FibldmError(f"volumes must be looked up among at least two training scans; got {len(training)}")
        self.spacing, self.training = spacing, training
        weights = sum(one.weight for one in training)
        self.common = sum(one.weight * one.detail for one in training) / np.maximum(weights, 1)
        rows = [self._rows(training, part) for part in (0, 1)]
        self._means = tuple(part.mean(axis=0) for part in rows)
        self.features = tuple(_unit(part - mean) for part, mean in zip(rows, self._means, strict=True))

    @classmethod
    def of(cls, training: Iterable[Volume], spacing: float) -> "Matcher":
        """Of training scans with their axes in any order, of which one is held at a time; units and grids may differ.

        Raises:
            FibldmError: there are fewer than two, or one is constant.
        """
        return cls([rounded(Opened(volume, spacing).at()) for volume in training], spacing)

    @classmethod
    def read(cls, file: Path) -> "Matcher":
        """Inverse of `write`.

        Raises:
            FibldmError: the file is missing, damaged, or none of these.
        """
        try:
            with np.load(file, allow_pickle=False) as stored:
                details, lengths, shapes = (stored[name] for name in ("details", "lengths", "shapes"))
                spacing = float(stored["spacing"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise FibldmError(f"{file} must be as `fibldm audit` wrote it; {error}", "run the audit again") from error
        parts = zip(details.astype(np.float32), lengths.tolist(), shapes, strict=True)
        return cls([Prepared(detail, (x, y, z), shape) for detail, (x, y, z), shape in parts], spacing)

    def write(self, file: Path) -> None:
        """The training scans in the cube: coarse pictures of patients, to be kept where the scans are."""
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(
                stream,
                details=np.stack([one.detail for one in self.training]).astype(np.float16),
                lengths=np.array([one.lengths for one in self.training], dtype=np.int16),
                shapes=np.stack([one.shape for one in self.training]),
                spacing=np.array(self.spacing),
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the training scans in the cube, and of how volumes are compared with them."""
        digest = hashlib.sha256(f"{METHOD} {self.spacing}".encode())
        for one in self.training:
            digest.update(one.detail.tobytes() + one.shape.tobytes() + str(one.lengths).encode())
        return digest.hexdigest()

    def open(self, volume: Volume) -> Opened:
        """A volume, ready to be looked up; see `Opened`."""
        return Opened(volume, self.spacing)

    def features_of(self, prepared: Sequence[Prepared]) -> tuple[Floats, ...]:
        """Rows of norm 1 in both feature spaces, spectrum and shape, of volumes as they lie."""
        return tuple(_unit(self._rows(prepared, part) - mean) for part, mean in enumerate(self._means))

    @staticmethod
    def _rows(prepared: Sequence[Prepared], part: int) -> Floats:
        return np.stack([(one.spectrum[_HALF], one.shape.ravel())[part] for one in prepared])

    def match(self, volume: Opened) -> Match:
        """The training scan most similar to a volume, in any turn, at scales from 0.9 to 1.1, shifted a little."""
        places = list(self._candidates(volume))
        roughly = [_rough(self.training[index], volume.at(scale), turn) for index, scale, turn in places]
        best_places = [places[place] for place in np.argsort(roughly)[::-1][:_ALIGNED]]
        found = [
            Match(index, *self._aligned(self.training[index], volume.at(scale), scale, turn))
            for index, scale, turn in best_places
        ]
        return max(found, key=lambda match: match.similarity)

    def similarity(self, scan: Prepared, volume: Prepared) -> float:
        """Of any scan with a volume that lies as it does, but for a small shift."""
        return self._aligned(scan, volume, 1.0, Turn())[0]

    def _aligned(self, scan: Prepared, volume: Prepared, scale: float, turn: Turn) -> tuple[float, Transform]:
        """At the shift where the details are most alike, without what training scans have in common there."""
        correlations = _correlations(scan, volume, turn)
        place = np.unravel_index(int(np.abs(correlations).argmax()), correlations.shape)
        steps = [int(_STEPS[step]) for step in place]
        sign = -1 if correlations[place] < 0 else 1
        detail, weight = (_moved(turn(part), steps) for part in (volume.detail, volume.weight))
        both = (scan.weight * weight) ** 2
        similarity = _correlation(both, scan.detail - self.common, sign * detail - self.common)
        x, y, z = (float(step * self.spacing) for step in steps)
        return max(0.0, min(similarity, 1.0)), Transform(turn, scale, (x, y, z), sign < 0)

    def _candidates(self, volume: Opened) -> Iterator[tuple[int, float, Turn]]:
        """Training scans with scales and turns at which they are most similar, of both feature spaces."""
        keys = [(scale, turn) for scale in _SCALES for turn in _TURNS]
        rows = np.concatenate([volume.at(scale).spectrum.ravel()[_SPECTRUM_TURNED] for scale in _SCALES])
        alike = self.features[0] @ _unit(rows - self._means[0]).T
        for index in np.argsort(-alike.max(axis=1))[: _CANDIDATES[0]]:
            scale, turn = keys[int(alike[index].argmax())]
            yield from ((int(index), scale, one) for one in (turn, _opposite(turn)))
        coarse_keys = [(scale, turn) for scale in _SHAPE_SCALES for turn in _ALL_TURNS]
        alike = np.concatenate([self._shapes_alike(volume.at(scale).shape) for scale in _SHAPE_SCALES], axis=1)
        for index in np.argsort(-alike.max(axis=1))[: _CANDIDATES[1]]:
            coarse, turn = coarse_keys[int(alike[index].argmax())]
            for scale in (near for near in _SCALES if abs(near - coarse) < 0.06):
                yield int(index), scale, turn

    def _shapes_alike(self, shape: Floats) -> Floats:
        """Of a shape in all turns with each of the training scans, ``(N, 48)``: the largest of all small shifts."""
        rows = _unit(shape.ravel()[_shape_turned()] - self._means[1])
        alike: Floats = (self.features[1] @ rows.T).reshape(len(self.training), len(_ALL_TURNS), -1).max(axis=2)
        return alike


def turned_back(grey: Floats, transform: Transform, spacing: float) -> Floats:
    """Grey values of a volume as the training scan lies, ``(SIDE, SIDE, SIDE)`` in ``[0, 1]``, but for its scale."""
    steps = [round(part / spacing) for part in transform.shift]
    moved = _moved(transform.turn(grey), steps)
    return 1 - moved if transform.inverted else moved


def _moved(cube: Floats, steps: Sequence[int]) -> Floats:
    """By whole voxels, 0 where nothing comes in."""
    moved = np.zeros_like(cube)
    to = tuple(slice(max(step, 0), n + min(step, 0)) for step, n in zip(steps, cube.shape, strict=True))
    source = tuple(slice(max(-step, 0), n - max(step, 0)) for step, n in zip(steps, cube.shape, strict=True))
    moved[to] = cube[source]
    return moved


def _unit(rows: Floats) -> Floats:
    """Rows ``(..., D)`` of mean 0 and norm 1; 0 where nothing is left."""
    rows = rows - rows.mean(axis=-1, keepdims=True)
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)
    return unit


def _opposite(turn: Turn) -> Turn:
    x, y, z = turn.signs
    return Turn(turn.axes, (-x, -y, -z))


def _rough(scan: Prepared, volume: Prepared, turn: Turn) -> float:
    """The largest product of details at all small shifts, of the norms of both."""
    product = fft.irfftn(scan.transformed * np.conj(fft.rfftn(turn(volume.weighted))), s=(SIDE,) * 3)
    return float(np.abs(product[_NEAR]).max() / max(scan.norm * volume.norm, 1e-6))


def _correlations(scan: Prepared, volume: Prepared, turn: Turn) -> Floats:
    """Of details where both count, at all small shifts; 0 where too little of them overlaps."""
    left, right = scan.weight**2, turn(volume.weight) ** 2
    detail = turn(volume.detail)
    mine = [fft.rfftn(part) for part in (left, left * scan.detail, left * scan.detail**2)]
    other = [np.conj(fft.rfftn(part)) for part in (right, right * detail, right * detail**2)]

    def at_all_shifts(one: int, two: int) -> Floats:
        product: Floats = fft.irfftn(mine[one] * other[two], s=(SIDE,) * 3)[_NEAR]
        return product

    strengths = np.maximum(at_all_shifts(2, 0) * at_all_shifts(0, 2), 1e-12)
    enough = at_all_shifts(0, 0) >= _OVERLAP * min(left.sum(), right.sum())
    correlations: Floats = np.where(enough, at_all_shifts(1, 1) / np.sqrt(strengths), 0)
    return correlations


def _correlation(weight: Floats, left: Floats, right: Floats) -> float:
    """Of values without their means, each counting as much as its weight."""
    total = max(float(weight.sum()), 1e-6)
    left, right = (part - (weight * part).sum() / total for part in (left, right))
    norms = (weight * left**2).sum() * (weight * right**2).sum()
    return float((weight * left * right).sum() / np.sqrt(max(float(norms), 1e-12)))


_STEPS = np.arange(-_SHIFT, _SHIFT + 1)
_NEAR = np.ix_(_STEPS, _STEPS, _STEPS)
_HALF = (np.arange(LENGTHS.size).reshape(LENGTHS.shape) < LENGTHS.size // 2) & (LENGTHS <= FREQUENCIES)
"""Half of the frequencies within a ball: the others are the same."""

_ALL_TURNS = [*_TURNS, *map(_opposite, _TURNS)]
_SPECTRUM_TURNED = np.stack([turn(np.arange(_HALF.size).reshape(_HALF.shape))[_HALF] for turn in _TURNS])
"""Places of a spectrum that come to lie at `_HALF`, ``(24, D)``."""


@cache
def _shape_turned() -> NDArray[np.intp]:
    """Places of a coarse shape at all places of another one, ``(48 * 27, D)``: in all turns, at all small shifts."""
    places = np.arange(SHAPE**3).reshape((SHAPE,) * 3)
    steps = list(itertools.product(_SHAPE_SHIFTS, repeat=3))
    return np.stack([np.roll(turn(places), step, axis=(0, 1, 2)).ravel() for turn in _ALL_TURNS for step in steps])
