"""The volumes that a report shows: which ones, and what is seen beside each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.evaluation.provenance import read_provenance
from fibldm.report.gallery import Shown, as_drawn, labels_of, range_of
from fibldm.report.parts import Picture
from fibldm.report.planes import Row, centre_of, degrees_off, picture_of
from fibldm.report.subject import Subject
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Affine
from fibldm.volumes.intensity import load_intensity
from fibldm.volumes.masks import volumes_in
from fibldm.volumes.writer import volume_stem

_OBLIQUE = 5.0  # degrees, from which on a letter is only about right


@dataclass(frozen=True)
class View:
    """A volume of a case as it is shown.

    Attributes:
        what: "mask", "synthetic", or whose real scan it is.
        voxels: ``(X, Y, Z)`` on RAS+ axes, from 0 (black) to 255 (white); of a mask nothing but black.
        labels: on the same grid; None where there are none.
        affine: voxel index to RAS+ mm.
    """

    what: str
    voxels: NDArray[np.uint8]
    labels: NDArray[np.uint8] | None
    affine: Affine

    @property
    def is_mask(self) -> bool:
        return self.what == "mask"

    def row(self) -> Row:
        """As a row of a picture."""
        centre = centre_of(self.voxels, self.labels)
        return Row(self.what, self.voxels, self.labels, self.affine, self.is_mask, centre)


@dataclass(frozen=True)
class Case:
    """A synthetic volume with what is seen beside it.

    Attributes:
        name: of the volume.
        chosen: why it is shown.
        views: from left to right.
        notes: what else must be said of it.
    """

    name: str
    chosen: str
    views: Sequence[View]
    notes: Sequence[str] = ()

    def picture(self) -> Picture:
        """All of it in three planes, which needs no program to be seen."""
        columns = "axial, coronal and sagittal" if self.views[0].voxels.shape[2] > 1 else "axial"
        rows = "; ".join(view.what for view in self.views)
        alt = f"{self.name} in {columns} slices through its labels, one row each: {rows}"
        chosen = [f"Shown for: {self.chosen}."] if self.chosen else []
        said = [f"{self.name}, SYNTHETIC, not a patient.", *chosen, *self.notes]
        return Picture(alt, " ".join(said), picture_of([view.row() for view in self.views]))


@dataclass(frozen=True)
class Beside:
    """A real scan to show beside a volume.

    Attributes:
        what: whose it is, in words.
        image: its file.
        mask: file of its labels; None where there are none.
    """

    what: str
    image: Path
    mask: Path | None


def cases_of(
    folder: Path,
    subject: Subject,
    *,
    most: int,
    real: Callable[[str], Sequence[Beside]] | None,
) -> tuple[list[Case], dict[int, str]]:
    """Synthetic volumes of a folder with their masks: the worst, the middle and the best, not a choice of beauty.

    Args:
        folder: output of ``fibldm synthesize``.
        subject: whose volumes they are.
        most: how many are shown.
        real: the real scans that belong beside a volume of some name; None shows none.

    Returns:
        The cases, and all labels that occur with their names.

    Raises:
        FibldmError: it holds no volume, or volumes of other weights.
    """
    files = {volume_stem(file): file for file in volumes_in(folder)}
    if not files:
        raise FibldmError(f"{folder} must hold synthetic volumes (.nii, .nii.gz); it holds none", "check the path")
    _check_drawn(list(files.values()), subject)
    window = _window(subject)
    chosen = choose(list(files), subject, most)
    cases = [_case(files[name], why, window, real) for name, why in chosen.items()]
    seen = {
        int(value)
        for case in cases
        for view in case.views
        if view.labels is not None
        for value in np.unique(view.labels)
    }
    names = subject.labels
    return cases, {value: names.get(value, f"label {value}") for value in sorted(seen - {0, 255})}


def choose(names: Sequence[str], subject: Subject, most: int) -> dict[str, str]:
    """Names of volumes to show, with the reasons; by what was measured where that is known, and else from all over."""
    reasons: dict[str, list[str]] = {}
    dice = {
        case["case"]: case["dice"]
        for case in subject.sections.get("faithfulness", {}).get("cases", [])
        if case.get("dice") is not None and case["case"] in names
    }
    ordered = sorted(dice, key=lambda name: (dice[name], name))
    if ordered:
        for place, what in ((0, "lowest"), (len(ordered) // 2, "middle"), (-1, "highest")):
            reasons.setdefault(ordered[place], []).append(f"{what} Dice ({dice[ordered[place]]:.3f})")
    closest = [name for name in nearest_scans(subject) if name in names]
    if closest:
        reasons.setdefault(closest[0], []).append("closest to a training scan")
    step = max(1, len(names) // most)
    for name in (*names[::step], *names):
        if len(reasons) >= most:
            break
        reasons.setdefault(name, [])
    return {name: " and ".join(why) for name, why in list(reasons.items())[:most]}


def nearest_scans(subject: Subject) -> dict[str, tuple[str, float]]:
    """For each volume its nearest training scan and the similarity, the most similar first; of the audit, if any."""
    if subject.audit and "closest" in subject.audit:
        found = {
            volume_stem(Path(pair["synthetic"])): (volume_stem(Path(pair["train"])), float(pair["score"]))
            for pair in subject.audit["closest"]
        }
    else:
        found = {
            case["case"]: (case["nearest"], float(case["similarity"]))
            for case in subject.sections.get("copies", {}).get("cases", [])
            if case.get("nearest") is not None and case.get("similarity") is not None
        }
    return dict(sorted(found.items(), key=lambda pair: -pair[1][1]))


def scans_beside(subject: Subject) -> Callable[[str], Sequence[Beside]]:
    """The real scans that belong beside a volume: the nearest training scan, and that of its mask."""
    entries = _entries(subject)
    nearest = nearest_scans(subject)

    def beside(name: str) -> list[Beside]:
        found = []
        if name in nearest and (entry := entries.get(nearest[name][0])):
            found.append(_scan(f"nearest training scan, similarity {nearest[name][1]:.3f}", entry))
        if entry := entries.get(name.rpartition("_")[0]):
            found.append(_scan("scan that the mask was drawn on", entry))
        return found

    return beside


def _entries(subject: Subject) -> dict[str, Mapping[str, Any]]:
    if subject.work is None:
        return {}
    content = subject.work.datalist
    return {entry["case"]: entry for split in ("training", "validation", "test") for entry in content[split]}


def _scan(what: str, entry: Mapping[str, Any]) -> Beside:
    return Beside(what, Path(entry["image"]), Path(entry["label"]) if entry.get("label") else None)


def _case(
    file: Path, why: str, window: tuple[float, float] | None, real: Callable[[str], Sequence[Beside]] | None
) -> Case:
    shown = as_drawn(file)
    made = _view("synthetic", shown, window)
    views = [made]
    if made.labels is not None:
        views.insert(0, View("mask", np.zeros_like(made.voxels), made.labels, made.affine))
    if real is not None:
        for scan in real(shown.name):
            views.append(_view(scan.what, Shown(scan.what, scan.image, scan.mask), window))
    notes = [] if shown.synthetic else ["It has no sidecar that says it is synthetic."]
    notes += [] if made.labels is not None else ["It has no mask."]
    if (off := degrees_off(made.affine)) > _OBLIQUE:
        notes.append(f"Its axes are oblique, by up to {off:.0f}°: letters name the nearest direction.")
    return Case(shown.name, why, views, notes)


def _view(what: str, shown: Shown, window: tuple[float, float] | None) -> View:
    scan = read_scan((shown.image,))
    labels = None if shown.mask is None else labels_of(shown, scan.array.shape[:3], scan.affine)
    voxels = scan.array if scan.array.ndim == 3 else scan.array[..., 0]
    low, high = shown.window or window or range_of(voxels)
    grey = np.clip((voxels.astype(np.float32) - low) / (high - low), 0, 1)
    return View(what, np.rint(np.nan_to_num(grey) * 255).astype(np.uint8), labels, scan.affine)


def _window(subject: Subject) -> tuple[float, float] | None:
    """Of CT and of declared ranges; MR has another for each volume."""
    known = subject.facts.get("intensity") or {}
    if not known and subject.work is not None:
        known = load_intensity(subject.work.folder / "intensity.json").to_dict()
    return (float(known["low"]), float(known["high"])) if known.get("kind") in ("window", "suv", "range") else None


def _check_drawn(files: Sequence[Path], subject: Subject) -> None:
    """Refuse volumes that are not of what the report is of, or of several samplings."""
    own = subject.weights | _measured_weights(subject)
    if not own:
        return
    try:
        read_provenance(files, lambda: own, of=subject.name)
    except FibldmError as error:
        raise FibldmError(error.message, "give volumes of this generator, of one sampling") from error


def _measured_weights(subject: Subject) -> frozenset[str]:
    drawn = [(part.get("drawn") or {}).get("weights") for part in subject.sections.values()]
    return frozenset(weights for weights in drawn if weights)
