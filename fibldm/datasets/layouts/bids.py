"""BIDS: MRI under sub-XX/[ses-YY/]anat/, masks under derivatives/."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fibldm.datasets.layouts.bids_masks import find_masks, is_binary, label_names_of, masks_of
from fibldm.datasets.layouts.bids_names import ends_with, inherited, is_nifti, suffix
from fibldm.datasets.layouts.entries import case_name, collected, visible
from fibldm.datasets.layouts.facts import check_cases, describe, left_out
from fibldm.datasets.layouts.manifest import covariates, read_records
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.volumes.scan import Covariate

_NO_IMAGES = ("defacemask",)
_ACQUISITION = {
    "RepetitionTime": ("repetition_time_ms", 1000.0),
    "EchoTime": ("echo_time_ms", 1000.0),
    "MagneticFieldStrength": ("field_strength_t", 1.0),
    "SliceThickness": ("slice_thickness_mm", 1.0),
}
"""Fields of a side file (seconds, tesla, mm) with the names of `ACQUISITION` and the factor to their unit."""


@dataclass(frozen=True)
class Session:
    """The images of one patient at one time.

    Attributes:
        subject: ``sub-XX``.
        session: ``ses-YY``, or ``None``.
        images: NIfTI files of its folder ``anat``.
    """

    subject: str
    session: str | None
    images: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Patient and session."""
        return f"{self.subject}_{self.session}" if self.session else self.subject


def is_bids(source: Path) -> bool:
    """Whether ``source`` has images where BIDS has them."""
    return any(any(source.glob(f"{folder}/anat/*.nii*")) for folder in ("sub-*", "sub-*/ses-*"))


def bids(source: Path, channels: tuple[str, ...], mask_pattern: str | None) -> Source:
    """One case for every patient and session.

    Args:
        source: the root of the dataset.
        channels: endings of the images to take, such as ``("T1w", "FLAIR")`` or ``("run-1_T1w",)``; empty takes the
            only suffix that every session has.
        mask_pattern: which files under derivatives/ are the masks, by name or by path below it, such as
            ``"*_label-lesion_mask.nii.gz"``; ``None`` takes the only kind of ``_dseg`` and ``_mask`` there is.

    Raises:
        FibldmError: it is not clear which images or masks to take; or one is missing or stands twice (all listed).
    """
    sessions = _sessions(source)
    channels = channels or (_only_suffix(source, sessions),)
    masks, problems = find_masks(source, mask_pattern), list[str]()
    people, notes = _participants(source / "participants.tsv")
    cases = [_case(source, session, channels, masks, problems) for session in sessions]
    cases = [_with_covariates(case, people) for case in cases]
    taken = [file for case in cases for mask in case.masks for file in mask.files]
    if masks and not taken:
        problems.append(
            f"none of the {len(masks)} masks under derivatives/ belongs to a patient and session with images"
        )
    else:
        what = "masks under derivatives/ of no patient and session with images"
        notes += left_out(what, (file.relative_to(source).as_posix() for file in masks if file not in taken))
    labels = label_names_of(source, taken, problems)
    check_cases(cases, problems, source, "choose images with --channels and masks with --bids-mask")
    patients = {path.name for path in source.glob("sub-*") if path.is_dir() or path.is_symlink()} | people.keys()
    notes += left_out("patients without an image under anat/", patients - {session.subject for session in sessions})
    facts = _description(source / "dataset_description.json")
    return describe("bids", source, cases, facts, notes=notes, channels=channels, labels=labels)


def _sessions(source: Path) -> list[Session]:
    folders = sorted(folder for depth in ("sub-*", "sub-*/ses-*") for folder in source.glob(f"{depth}/anat"))
    sessions = []
    for folder in folders:
        parts = folder.relative_to(source).parts
        images = tuple(path for path in visible(folder) if is_nifti(path) and suffix(path) not in _NO_IMAGES)
        if images:
            sessions.append(Session(parts[0], parts[1] if len(parts) == 3 else None, images))
    if not sessions:
        raise FibldmError(f"{source} must hold images such as sub-01/anat/sub-01_T1w.nii.gz; found none")
    return sessions


def _only_suffix(source: Path, sessions: Sequence[Session]) -> str:
    present = [{suffix(path) for path in session.images} for session in sessions]
    shared = sorted(set.intersection(*present))
    if len(shared) != 1:
        counts = {name: sum(name in names for names in present) for name in sorted(set.union(*present))}
        listed = ", ".join(f"{name} in {count}" for name, count in counts.items())
        raise FibldmError(
            f"one suffix must be in all {len(sessions)} sessions of {source}; found {listed}",
            "choose the channels, for example --channels T1w,FLAIR",
        )
    return shared[0]


def _case(source: Path, session: Session, channels: Sequence[str], masks: Sequence[Path], problems: list[str]) -> Case:
    images = {channel: _image(session, channel, problems) for channel in channels}
    found = masks_of(source, masks, session.subject, session.session)
    if len(found) > 1:
        names = ", ".join(file.relative_to(source).as_posix() for file in found)
        problems.append(f"{session.name} must have one mask; found {names}")
    files = {channel: path for channel, path in images.items() if path is not None}
    return Case(
        name=case_name(session.name),
        images=tuple(collected(path, problems) for path in files.values()),
        masks=tuple(Mask(collected(path, problems), 1 if is_binary(path) else None) for path in found[:1]),
        path=next((path.relative_to(source).as_posix() for path in files.values()), session.name),
        subject=session.subject,
        covariates=_acquisition(source, files, problems),
    )


def _image(session: Session, channel: str, problems: list[str]) -> Path | None:
    found = [path for path in session.images if ends_with(path, channel)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found or session.images)
        problems.append(f"{session.name} must have one image {channel}; found {names}")
    return found[0] if found else None


def _acquisition(source: Path, files: Mapping[str, Path], problems: list[str]) -> dict[str, Covariate]:
    """What the side files say; under one name where all channels agree, else one a channel (``echo_time_ms_T1w``)."""
    said: dict[str, dict[str, float]] = {}
    for channel, path in files.items():
        for name, value in _side_facts(source, path, problems).items():
            said.setdefault(name, {})[channel] = value
    facts: dict[str, Covariate] = {}
    for name, values in said.items():
        if len(values) == len(files) and len(set(values.values())) == 1:
            facts[name] = next(iter(values.values()))
        else:
            facts.update({f"{name}_{channel}": value for channel, value in values.items()})
    return facts


def _side_facts(source: Path, image: Path, problems: list[str]) -> dict[str, float]:
    said: dict[str, Any] = {}
    for path in inherited(image, source, ".json"):
        said |= _read_object(path)
    facts = {}
    for field, (name, factor) in _ACQUISITION.items():
        if field not in said:
            continue
        if not isinstance(said[field], int | float) or not math.isfinite(said[field]):
            problems.append(f"{field} of {image.name} must be a number; got {said[field]!r}")
        else:
            facts[name] = round(said[field] * factor, 6)
    return facts


def _participants(path: Path) -> tuple[dict[str, dict[str, Covariate]], tuple[str, ...]]:
    """Covariates by patient, and notes."""
    if not path.is_file():
        return {}, ()
    columns, records = read_records(path, "participant_id")
    known, notes = covariates([name for name in columns if name != "participant_id"], records)
    return {record["participant_id"]: values for record, values in zip(records, known, strict=True)}, notes


def _with_covariates(case: Case, people: Mapping[str, Mapping[str, Covariate]]) -> Case:
    return replace(case, covariates={**people.get(str(case.subject), {}), **case.covariates})


def _description(path: Path) -> dict[str, Any]:
    """What dataset_description.json says, under the keys of a Decathlon dataset.json."""
    said = _read_object(path) if path.is_file() else {}
    authors, links = (said.get(key) or [] for key in ("Authors", "ReferencesAndLinks"))
    return {
        "name": said.get("Name"),
        "modality": "MRI",
        "licence": said.get("License"),
        "reference": "; ".join(map(str, links)) if isinstance(links, list) else str(links),
        "attribution": said.get("HowToAcknowledge") or (", ".join(map(str, authors)) if authors else None),
    }


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise FibldmError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content
