"""Which training scan a volume was made from, even if it was turned, mirrored, moved, scaled or retouched.

Two chests correlate because both are chests. What tells patients apart is their detail: a band of scales above what an
autoencoder or a blur takes away and below what a body has in common with others, divided by how strong it is nearby, so
that another window or brightness curve changes little. Training scans that may match are found in two feature spaces
that all turns and scales of a volume are looked up in:

* the amplitude spectrum of the detail, which a shift does not change;
* the coarse shape, at all small shifts.

The similarity of a volume and a scan is the correlation of their details where they overlap, the largest of all places
of those candidates. Correlations at all shifts at once are those of Padfield 2012, "Masked object registration in the
Fourier domain", equations 9 to 12, with weights in place of masks and without local means.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from fibldm.errors import FibldmError
from fibldm.volumes.grid import Volume

SIDE = 48
"""Voxels along each axis of the cube that volumes are compared in."""

_FINE, _COARSE = 0.7, 2.0  # voxels: what is finer and what is coarser is no detail
_EVEN = 0.3  # of the mean strength of detail: where there is less, it is not made as strong as elsewhere
_FLAT = 0.15  # of the standard deviation of a volume: slices with less hold next to nothing
_TAPER = 4  # voxels at a border that count less and less
_SCALES = (0.9, 0.925, 0.95, 0.975, 1.0, 1.025, 1.05, 1.075, 1.1)
_FREQUENCIES = SIDE // 4
_SHAPE, _SHAPE_SCALES, _SHAPE_SHIFTS = 12, (0.9, 1.0, 1.1), (-1, 0, 1)
_CANDIDATES = (8, 4)  # of spectrum and shape
_ALIGNED = 5  # of all places of the candidates
_OVERLAP = 0.6  # of the smaller volume, at least
_SHIFT = SIDE // 8  # at most
_PERCENTILES = (1, 99)
_LONGEST = 95  # percentile of the longest axes, in mm, that the cube holds

Floats = NDArray[np.float32]


class Turn(NamedTuple):
    """A permutation of the axes ``R, A, S``, and then which of them are mirrored (-1)."""

    axes: tuple[int, int, int] = (0, 1, 2)
    signs: tuple[int, int, int] = (1, 1, 1)

    def __call__(self, array: Floats) -> Floats:
        turned: Floats = array.transpose(self.axes)[tuple(slice(None, None, sign) for sign in self.signs)]
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


@dataclass(frozen=True)
class Prepared:
    """A volume in the cube: its grey values, its detail, how much each voxel counts, and its coarse shape, as cubes."""

    grey: Floats
    detail: Floats
    weight: Floats
    shape: Floats

    @cached_property
    def transformed(self) -> NDArray[np.complex64]:
        """The Fourier transform of the detail."""
        frequencies: NDArray[np.complex64] = fft.rfftn(self.detail * self.weight)
        return frequencies

    @cached_property
    def spectrum(self) -> Floats:
        """Low frequencies of the amplitude spectrum, zero in the middle; each frequency's mean is 1."""
        middle = slice(SIDE // 2 - _FREQUENCIES, SIDE // 2 + _FREQUENCIES + 1)
        amplitude = np.abs(fft.fftshift(fft.fftn(self.detail * self.weight)))[middle, middle, middle]
        sums = np.bincount(_RADII.ravel(), amplitude.ravel()) / np.bincount(_RADII.ravel())
        whitened: Floats = (amplitude / (sums[_RADII] + 1e-9)).astype(np.float32)
        return whitened


class Matcher:
    """Looks volumes up among training scans.

    Args:
        training: scans with their axes in any order; units and grids may differ.
        spacing: mm of a voxel of the cube; None takes what holds nearly all of the training scans, which are not made
            finer than they are.

    Raises:
        FibldmError: there are fewer than two scans, or one is constant.
    """

    def __init__(self, training: Sequence[Volume], spacing: float | None = None) -> None:
        if len(training) < 2:
            raise FibldmError(f"volumes must be looked up among at least two training scans; got {len(training)}")
        self.spacing = spacing or _spacing(training)
        self.training = [self.prepare(volume) for volume in training]
        weights = sum(one.weight for one in self.training)
        self.common = sum(one.weight * one.detail for one in self.training) / np.maximum(weights, 1)
        rows = [self._rows(self.training, part) for part in (0, 1)]
        self._means = tuple(part.mean(axis=0) for part in rows)
        self.features = tuple(_unit(part - mean) for part, mean in zip(rows, self._means, strict=True))

    def features_of(self, volumes: Sequence[Volume]) -> tuple[Floats, ...]:
        """Rows of norm 1 in both feature spaces, spectrum and shape, of volumes as they lie."""
        prepared = [self.prepare(volume) for volume in volumes]
        return tuple(_unit(self._rows(prepared, part) - mean) for part, mean in enumerate(self._means))

    @staticmethod
    def _rows(prepared: Sequence[Prepared], part: int) -> Floats:
        return np.stack([(one.spectrum[_HALF], one.shape.ravel())[part] for one in prepared])

    def prepare(self, volume: Volume, scale: float = 1.0) -> Prepared:
        """A volume in the cube, made smaller by ``scale``.

        Raises:
            FibldmError: it is constant.
        """
        turned = volume.canonical()
        array = np.asarray(turned.array, dtype=np.float32)
        low, high = np.percentile(array, _PERCENTILES)
        if not high > low:
            raise FibldmError(f"a volume that is looked up must not be constant; nearly all of it is {low:g}")
        array = _without_padding(np.clip((array - low) / (high - low), 0, 1))
        zoom = np.asarray(turned.grid.spacing) / (self.spacing * scale)
        smoothed = ndimage.gaussian_filter(array, 0.45 * np.maximum(1 / zoom - 1, 0))
        array = ndimage.zoom(smoothed, [_zoom(n, z) for n, z in zip(array.shape, zoom, strict=True)], order=1)
        detail, weight = _detail(array), _weight(array.shape)
        return Prepared(_cube(array, SIDE), _cube(detail, SIDE), _cube(weight, SIDE), _shape(array))

    def match(self, volume: Volume) -> Match:
        """The training scan most similar to a volume, in any turn, at scales from 0.9 to 1.1, shifted a little."""
        scaled = {scale: self.prepare(volume, scale) for scale in _SCALES}
        places = list(self._candidates(scaled))
        roughly = [_rough(self.training[index], scaled[scale], turn) for index, scale, turn in places]
        best_places = [places[place] for place in np.argsort(roughly)[::-1][:_ALIGNED]]
        found = [
            Match(index, *self._aligned(self.training[index], scaled[scale], scale, turn))
            for index, scale, turn in best_places
        ]
        return max(found, key=lambda match: match.similarity)

    def similarity(self, scan: Volume, volume: Volume) -> float:
        """Of any scan with a volume that lies as it does, but for a small shift."""
        return self._aligned(self.prepare(scan), self.prepare(volume), 1.0, Turn())[0]

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

    def _candidates(self, scaled: dict[float, Prepared]) -> Iterator[tuple[int, float, Turn]]:
        """Training scans with scales and turns at which they are most similar, of both feature spaces."""
        keys = [(scale, turn) for scale in _SCALES for turn in _TURNS]
        rows = np.stack([turn(scaled[scale].spectrum)[_HALF] for scale, turn in keys])
        alike = self.features[0] @ _unit(rows - self._means[0]).T
        for index in np.argsort(-alike.max(axis=1))[: _CANDIDATES[0]]:
            scale, turn = keys[int(alike[index].argmax())]
            yield from ((int(index), scale, one) for one in (turn, _opposite(turn)))
        all_turns = [*_TURNS, *map(_opposite, _TURNS)]
        coarse_keys = [(scale, turn) for scale in _SHAPE_SCALES for turn in all_turns]
        alike = np.stack([self._shapes_alike(turn(scaled[scale].shape)) for scale, turn in coarse_keys], axis=1)
        for index in np.argsort(-alike.max(axis=1))[: _CANDIDATES[1]]:
            coarse, turn = coarse_keys[int(alike[index].argmax())]
            for scale in (near for near in _SCALES if abs(near - coarse) < 0.06):
                yield int(index), scale, turn

    def _shapes_alike(self, shape: Floats) -> Floats:
        """Of a shape with each of the training scans, the largest of all small shifts."""
        steps = itertools.product(_SHAPE_SHIFTS, repeat=3)
        rows = np.stack([np.roll(shape, step, axis=(0, 1, 2)).ravel() for step in steps])
        alike: Floats = (self.features[1] @ _unit(rows - self._means[1]).T).max(axis=1)
        return alike


def turned_back(volume: Prepared, transform: Transform, spacing: float) -> Floats:
    """Grey values of a volume as the training scan lies, ``(SIDE, SIDE, SIDE)`` in ``[0, 1]``, but for its scale."""
    steps = [round(part / spacing) for part in transform.shift]
    grey: Floats = _moved(transform.turn(volume.grey), steps)
    return 1 - grey if transform.inverted else grey


def _moved(cube: Floats, steps: Sequence[int]) -> Floats:
    """By whole voxels, 0 where nothing comes in."""
    moved: Floats = ndimage.shift(cube, steps, order=0, mode="constant")
    return moved


def _spacing(training: Sequence[Volume]) -> float:
    longest = [max(np.multiply(volume.array.shape, volume.grid.spacing)) for volume in training]
    finest = min(min(volume.grid.spacing) for volume in training)
    return max(float(np.percentile(longest, _LONGEST)) / SIDE, finest)


def _zoom(length: int, zoom: float) -> float:
    """To a whole number of voxels, at least one."""
    return max(1, round(length * zoom)) / length


def _without_padding(array: Floats) -> Floats:
    """Without slices at the borders that are all but flat, as what fills a moved scan up is, even noisy or blurred."""
    least = _FLAT * float(array.std())
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        varies = np.flatnonzero(array.std(axis=others) > least)
        if array.shape[axis] > 1 and len(varies):
            array = array.take(range(varies[0], varies[-1] + 1), axis=axis)
    return array


def _detail(array: Floats) -> Floats:
    band = _smooth(array, _FINE) - _smooth(array, _COARSE)
    power = _smooth(band * band, _COARSE)
    even: Floats = band / (np.sqrt(np.maximum(power, 0)) + _EVEN * np.sqrt(power.mean()) + 1e-6)
    return even - even.mean()


def _smooth(array: Floats, sigma: float) -> Floats:
    smooth: Floats = ndimage.gaussian_filter(array, sigma, mode="nearest")
    return smooth


def _weight(shape: Sequence[int]) -> Floats:
    weight = np.ones(shape, dtype=np.float32)
    for axis, length in enumerate(shape):
        if length > 1:
            edge = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
            weight *= np.clip(edge / _TAPER, 0, 1).reshape([-1 if other == axis else 1 for other in range(3)])
    return weight


def _shape(array: Floats) -> Floats:
    """Grey values much coarser than detail, in a cube of their own."""
    zoom = _SHAPE / SIDE
    smooth = _smooth(array, 0.5 / zoom)
    smooth = ndimage.zoom(smooth - smooth.mean(), [_zoom(n, zoom) for n in array.shape], order=1)
    return _cube(smooth, _SHAPE)


def _cube(array: Floats, side: int) -> Floats:
    """The middle of an array in the middle of a cube, 0 around it."""
    cube = np.zeros((side,) * 3, dtype=np.float32)
    kept = [min(length, side) for length in array.shape]
    source = tuple(slice((n - k) // 2, (n - k) // 2 + k) for n, k in zip(array.shape, kept, strict=True))
    target = tuple(slice((side - k) // 2, (side - k) // 2 + k) for k in kept)
    cube[target] = array[source]
    return cube


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
    product = fft.irfftn(scan.transformed * np.conj(fft.rfftn(turn(volume.detail * volume.weight))), s=(SIDE,) * 3)
    norms = [np.linalg.norm(one.detail * one.weight) for one in (scan, volume)]
    return float(np.abs(product[_NEAR]).max() / max(float(norms[0] * norms[1]), 1e-6))


def _correlations(scan: Prepared, volume: Prepared, turn: Turn) -> Floats:
    """Of details where both count, at all small shifts; 0 where too little of them overlaps."""
    weight, detail = turn(volume.weight) ** 2, turn(volume.detail)
    mine = [fft.rfftn(scan.weight**2 * part) for part in (np.ones(()), scan.detail, scan.detail**2)]
    other = [np.conj(fft.rfftn(weight * part)) for part in (np.ones(()), detail, detail**2)]

    def at_all_shifts(left: int, right: int) -> Floats:
        product: Floats = fft.irfftn(mine[left] * other[right], s=(SIDE,) * 3)[_NEAR]
        return product

    strengths = np.maximum(at_all_shifts(2, 0) * at_all_shifts(0, 2), 1e-12)
    enough = at_all_shifts(0, 0) >= _OVERLAP * min((scan.weight**2).sum(), weight.sum())
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
_AXES = np.meshgrid(*[np.arange(-_FREQUENCIES, _FREQUENCIES + 1)] * 3, indexing="ij")
_LENGTHS = np.sqrt(sum(np.square(axis, dtype=float) for axis in _AXES))
_RADII = np.round(_LENGTHS).astype(int)
_HALF = (np.arange(_LENGTHS.size).reshape(_LENGTHS.shape) < _LENGTHS.size // 2) & (_LENGTHS <= _FREQUENCIES)
"""Half of the frequencies within a ball: the others are the same."""
