"""How much do volumes of one mask differ? A map of the standard deviation between them, and its size in each label."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated, need_masks, read_channels
from fibldm.evaluation.results import Section
from fibldm.evaluation.segmentation_metrics import FEWEST_VOXELS
from fibldm.evaluation.sets import mask_name
from fibldm.evaluation.statistics import Estimate, by_patient, mean_estimate
from fibldm.files import hash_file
from fibldm.progress import track
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume, turned_like
from fibldm.volumes.writer import write_synthetic

FEWEST_VOLUMES = 2
WHOLE = "whole"
DERIVED = "standard deviation between synthetic volumes of one mask"

_DESCRIPTION = "SYNTHETIC, DERIVED: standard deviation between volumes, by FibLDM"
_SAME_PLACE = 1e-2  # mm

Values = NDArray[np.float64]


class Spread(NamedTuple):
    """The spread of the volumes of one mask.

    Attributes:
        mask: its name.
        subject: its patient.
        volumes: their names.
        file: the map.
        values: root mean square of the map by the name of the figure, in the volumes' units.
    """

    mask: str
    subject: str
    volumes: Sequence[str]
    file: Path
    values: Mapping[str, float]


def measure_spread(evaluated: Evaluated, synthetic: Sequence[Case]) -> Section:
    """The spread of the volumes of each mask of which there are several, such as by ``fibldm synthesize --count 8``.

    ``EVALUATION/spread/<mask>.nii.gz`` is the standard deviation between them (``ddof=1``) in each voxel, on the grid
    of the mask and in the units of the volumes on disk, marked as synthetic and derived. Figures are its root mean
    square within each label (``spread/<label>``) and all that is known (``spread/whole``), of several channels for each
    (``spread/<channel>/<label>``): of few volumes, the mean of standard deviations would be too low, that of variances
    is not.

    Real patients have no such spread: of a mask there is one scan. ``real_vs_real`` is empty.

    Args:
        evaluated: the run and its work folder.
        synthetic: the volumes, with masks.

    Raises:
        FibldmError: a volume has no mask, no mask has two volumes, or volumes of one mask have other masks or grids.
    """
    need_masks(list(synthetic), "spread")
    groups: dict[str, list[Case]] = {}
    for case in synthetic:
        groups.setdefault(mask_name(case), []).append(case)
    several = {name: cases for name, cases in groups.items() if len(cases) >= FEWEST_VOLUMES}
    if not several:
        raise FibldmError(
            f"a spread needs at least {FEWEST_VOLUMES} volumes of one mask; each of these {len(groups)} has one",
            "synthesize with --count 8, say",
        )
    spreads = [_spread(evaluated, name, cases) for name, cases in track(list(several.items()), "spread")]
    facts = {
        "units": {"spread": evaluated.intensity.units},
        "maps": {spread.mask: spread.file.relative_to(evaluated.run_dir).as_posix() for spread in spreads},
        "volumes": {spread.mask: len(spread.volumes) for spread in spreads},
    }
    rows = [{"case": spread.mask, "subject": spread.subject, **spread.values} for spread in spreads]
    notes = [
        "Real patients have no such spread, as there is one scan of each of their masks: nothing stands beside it."
    ]
    if left_out := len(groups) - len(several):
        notes.append(f"{left_out} masks with one volume only were left out.")
    return Section(_figures(spreads), facts, rows, notes)


def deviation(volumes: Iterable[Values]) -> Values:
    """Standard deviation between at least two arrays of one shape, ``ddof=1``, one at a time (Welford 1962)."""
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for count, volume in enumerate(volumes, start=1):
        before = volume - mean
        mean = mean + before / count
        squares = squares + before * (volume - mean)
    return np.sqrt(squares / (count - 1))


def _figures(spreads: Sequence[Spread]) -> dict[str, Estimate]:
    figures = {}
    for name in dict.fromkeys(name for spread in spreads for name in spread.values):
        having = [spread for spread in spreads if name in spread.values]
        values = by_patient([spread.subject for spread in having], [spread.values[name] for spread in having])
        figures[name] = mean_estimate(values)
    return figures


def _spread(evaluated: Evaluated, name: str, cases: Sequence[Case]) -> Spread:
    stored = read_volume(str(cases[0].label))
    mask = stored.canonical()
    _check_masks(cases)
    maps = deviation(_voxels(evaluated, case, mask) for case in cases)
    file = evaluated.folder / "spread" / f"{name}.nii.gz"
    facts = {
        "derived": DERIVED,
        "volumes": [case.name for case in cases],
        "files": [hash_file(case.image) for case in cases],
        "units": evaluated.intensity.units,
    }
    own = [turned_like(Volume(part.astype(np.float32), mask.affine, mask.space), stored.grid) for part in maps]
    write_synthetic(file, own, facts, _DESCRIPTION)
    return Spread(name, cases[0].subject, [case.name for case in cases], file, _by_label(evaluated, maps, mask))


def _voxels(evaluated: Evaluated, case: Case, mask: Volume) -> Values:
    """``(C, X, Y, Z)``, as on disk."""
    channels = read_channels(case.image, len(evaluated.channels))
    for channel in channels:
        if channel.array.shape != mask.array.shape or not np.allclose(channel.affine, mask.affine, atol=_SAME_PLACE):
            raise FibldmError(f"{case.written} must lie on the grid of its mask {case.label}; it does not")
    return np.stack([channel.array for channel in channels]).astype(np.float64)


def _check_masks(cases: Sequence[Case]) -> None:
    """DICOM has a mask beside each volume."""
    first, *others = ((case, read_volume(str(case.label)).array) for case in cases)
    for case, labels in others:
        if not np.array_equal(labels, first[1]):
            raise FibldmError(
                f"volumes of one mask must have the same one; those of {first[0].name} and {case.name} differ",
                "synthesize into a new folder",
            )


def _by_label(evaluated: Evaluated, maps: Values, mask: Volume) -> dict[str, float]:
    regions = {WHOLE: mask.array != UNKNOWN_LABEL}
    regions |= {name: mask.array == value for value, name in evaluated.labels.items() if value}
    counted = {name: region for name, region in regions.items() if region.sum() >= FEWEST_VOXELS}
    prefixes = ["spread"] if len(maps) == 1 else [f"spread/{channel}" for channel in evaluated.channels]
    return {
        f"{prefix}/{name}": float(np.sqrt(np.square(part[region]).mean()))
        for prefix, part in zip(prefixes, maps, strict=True)
        for name, region in counted.items()
    }
