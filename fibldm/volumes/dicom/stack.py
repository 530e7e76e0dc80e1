"""Whether the frames of a DICOM series are one regular stack: in which order, and on which grid.

Coordinates are DICOM's, LPS+ mm, until the affine that is given. A place along the stack is the distance of a slice
from the origin along the normal of its plane; of axial slices it is their z.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError, some_of
from fibldm.volumes.dicom.acquired import AcquiredSlices
from fibldm.volumes.dicom.frames import Frame, Problem, in_plane, mixed, told_apart, unplaced
from fibldm.volumes.grid import LPS_TO_RAS

Array = NDArray[np.float64]

_SAME_PLACE_MM = 0.01
_EVEN = 0.02
"""How far a slice may lie from its place in an even stack, in slice spacings."""
_STRAIGHT = 0.2
"""How far a slice may be shifted within its plane, in pixels."""
_LISTED = 3
_RESAMPLE = "give `resample_tilt`, which brings such slices to a regular grid"


@dataclass(frozen=True)
class Stack:
    """Frames as one regular stack.

    Attributes:
        frames: in the order of their places.
        affine: ``(4, 4)``, ``(column, row, slice)`` to RAS+ mm; the axes are as stored.
        acquired: where the slices lie that have yet to be brought to this stack; ``None`` where they are on it.
    """

    frames: list[Frame]
    affine: Array
    acquired: AcquiredSlices | None = None


def stacked(frames: Sequence[Frame], problems: Sequence[Problem] = (), *, resample: bool = False) -> Stack:
    """Frames in the order of their places along the stack, and the grid of their voxels.

    Args:
        frames: in any order.
        problems: what is wrong already, to be named together with what is wrong with the stack.
        resample: whether slices may be sheared, as by a tilted gantry, or at uneven distances.

    Raises:
        FibldmError: there are problems, or the frames are of several images, have no place, share one, are uneven, have
            a gap, or are shifted against each other; all reasons are named.
    """
    found = [*problems, *mixed(frames)]
    if nowhere := list(unplaced(frames)):
        raise refusal([*found, *nowhere])
    directions, pixel = in_plane(frames[0])
    normal = np.cross(directions[:, 0], directions[:, 1])
    ordered = sorted(frames, key=lambda frame: float(_position(frame) @ normal))
    positions = np.array([_position(frame) for frame in ordered])
    irregular = list(_irregular(positions, normal, pixel.min()))
    resample = resample and bool(irregular) and all(remedy == _RESAMPLE for _, remedy in irregular)
    found += [*_together(ordered, positions @ normal), *([] if resample else irregular)]
    if len(frames) == 1 and _thickness(frames[0]) is None:
        found.append(("its only slice does not state its Slice Thickness", "give a series of several slices"))
    if found:
        raise refusal(found)
    if resample:
        shape = int(frames[0].header.Rows), int(frames[0].header.Columns)
        acquired = AcquiredSlices(positions, directions, pixel, shape)
        return Stack(ordered, LPS_TO_RAS @ acquired.affine, acquired)
    return Stack(ordered, _affine(ordered[0], positions, normal))


def refusal(problems: Sequence[Problem]) -> FibldmError:
    """The error that names all reasons, and every remedy once."""
    reasons = ", and ".join(dict.fromkeys(reason for reason, _ in problems))
    return FibldmError(
        f"a DICOM series must be one volume of parallel, evenly spaced slices; {reasons}",
        ", and ".join(dict.fromkeys(remedy for _, remedy in problems)),
    )


def _position(frame: Frame) -> Array:
    return np.array(frame.numbers("ImagePositionPatient", 3))


def _thickness(frame: Frame) -> float | None:
    thickness = frame.numbers("SliceThickness")
    return thickness[0] if thickness and thickness[0] > 0 else None


def _affine(first: Frame, positions: Array, normal: Array) -> Array:
    from highdicom.spatial import create_affine_matrix_from_attributes

    directions, pixel = in_plane(first)
    steps = len(positions) - 1
    step = (positions[-1] - positions[0]) @ normal / steps if steps else _thickness(first)
    affine = create_affine_matrix_from_attributes(
        image_position=positions[0].tolist(),
        image_orientation=directions.T.ravel().tolist(),
        pixel_spacing=pixel[::-1].tolist(),
        spacing_between_slices=float(step),  # type: ignore[arg-type]
    )
    return LPS_TO_RAS @ affine


def _together(frames: Sequence[Frame], places: Array) -> Iterator[Problem]:
    """Slices that share a place with the one before."""
    repeated = np.flatnonzero(np.diff(places) < _SAME_PLACE_MM) + 1
    if not repeated.size:
        return
    where = some_of((f"{place:.2f} mm" for place in np.unique(places[repeated].round(2))), _LISTED)
    reason = f"several slices lie in one place along the stack ({where})"
    first = int(repeated[0])
    if differ := told_apart(frames[first - 1 : first + 1]):
        yield f"{reason}, as it mixes {differ}", "split it by the scanner's or archive's export"
    else:
        yield reason, "leave out the copies"


def _irregular(positions: Array, normal: Array, pixel: float) -> Iterator[Problem]:
    """What keeps sorted slices from being even and straight; slices in the same place count once."""
    kept = np.concatenate([[True], np.diff(positions @ normal) >= _SAME_PLACE_MM])
    positions = positions[kept]
    if len(positions) < 2:
        return
    places = positions @ normal
    shifts = positions - positions[0] - np.outer(places - places[0], normal)
    if np.linalg.norm(shifts, axis=1).max() > _STRAIGHT * pixel:
        yield _leaning(shifts, places, pixel)
    if np.abs(places - np.linspace(places[0], places[-1], len(places))).max() > _EVEN * np.diff(places).mean():
        yield _uneven(places)


def _leaning(shifts: Array, places: Array, pixel: float) -> Problem:
    share = (places - places[0]) / (places[-1] - places[0])
    largest = np.linalg.norm(shifts, axis=1).max()
    if np.linalg.norm(shifts - np.outer(share, shifts[-1]), axis=1).max() > _STRAIGHT * pixel:
        return f"its slices are shifted against each other, by up to {largest:.2f} mm", "export the original series"
    degrees = np.degrees(np.arctan2(np.linalg.norm(shifts[-1]), places[-1] - places[0]))
    reason = f"its slices are sheared, as by a gantry tilt of {degrees:.1f} degrees"
    return reason, _RESAMPLE


def _uneven(places: Array) -> Problem:
    steps = np.diff(places)
    spacing = steps.min()
    counts = np.round(steps / spacing)
    if np.abs(steps / spacing - counts).max() < 2 * _EVEN and not _in_a_row(counts):
        gaps = np.flatnonzero(counts > 1)
        where = some_of((f"between {places[gap]:.2f} and {places[gap + 1]:.2f} mm" for gap in gaps), _LISTED)
        return f"slices are missing {where} (spacing {spacing:.2f} mm)", "transfer the whole series again"
    reason = f"its slice spacing is uneven, {spacing:.2f} to {steps.max():.2f} mm"
    return reason, _RESAMPLE


def _in_a_row(counts: Array) -> bool:
    """Whether wider steps follow each other to one end of the stack, as where a scan was planned in two spacings."""
    wide = counts > 1
    least = min(int(wide.sum()), int((~wide).sum()))
    return least > 1 and np.count_nonzero(np.diff(wide)) == 1 and len(set(counts[wide])) == 1
