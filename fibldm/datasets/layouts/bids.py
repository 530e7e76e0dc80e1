"""BIDS: MRI under sub-XX/[ses-YY/]anat/, masks under derivatives/."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.bids_masks import find_masks, is_binary, label_names_of, masks_of
from fibldm.datasets.layouts.bids_names import ends_with, inherited, is_nifti, suffix
from fibldm.datasets.layouts.entries import case_name, collected, visible
from fibldm.datasets.layouts.facts import Search, describe
from fibldm.datasets.layouts.manifest import covariates, read_records
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError, shown
from fibldm.files import read_json
from fibldm.volumes.scan import Covariate, as_body_part

_NO_IMAGES = ("defacemask",)
_ACQUISITION = {
    "RepetitionTime": ("repetition_time_ms", 1000.0),
    "EchoTime": ("echo_time_ms", 1000.0),
    "MagneticFieldStrength": ("field_strength_t", 1.0),
    "SliceThickness": ("slice_thickness_mm", 1.0),
}
"""Fields of a side file (seconds, tesla, mm) with the names of `ACQUISITION` and the factor to their unit."""
_TEXTS = {"body_part": ("BodyPartExamined", "BodyPart"), "kernel": ("ConvolutionKernel",)}
"""Fields whose text is taken where `PrepareSettings.facts` asks for it."""


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


def bids(search: Search) -> Source:
    """One case for every patient and session.

    Its images are those that end as the channels of the settings, such as ``T1w`` or ``run-1_T1w``, else of the only
    suffix that every session has; its mask is the one under derivatives/ that fits the pattern of the settings, else
    the only kind of ``_dseg`` and ``_mask`` there is.

    Raises:
        FibldmError: it is not clear which images or masks to take; or one is missing or stands twice (all listed).
    """
    source, findings = search.path, search.findings
    sessions = _sessions(source)
    channels = search.settings.channels or (_only_suffix(source, sessions),)
    masks = find_masks(source, search.settings.bids_mask)
    people = _participants(search)
    cases = [_case(search, session, channels, masks) for session in sessions]
    cases = [replace(case, covariates={**people.get(str(case.subject), {}), **case.covariates}) for case in cases]
    taken = [file for case in cases for mask in case.masks for file in mask.files]
    if masks and not taken:
        findings.error(
            f"none of the {len(masks)} masks under derivatives/ belongs to a patient and session with images"
        )
    else:
        what = "masks under derivatives/ of no patient and session with images"
        search.leave_out(what, (file.relative_to(source).as_posix() for file in masks if file not in taken))
    labels = label_names_of(source, taken, findings)
    patients = {path.name for path in source.glob("sub-*") if path.is_dir() or path.is_symlink()} | people.keys()
    search.leave_out("patients without an image under anat/", patients - {session.subject for session in sessions})
    facts = _description(source / "dataset_description.json")
    remedy = "choose images with `channels` and masks with `bids_mask`"
    return describe("bids", search, cases, facts, remedy=remedy, channels=channels, labels=labels)


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
            "choose `channels`, for example T1w,FLAIR",
        )
    return shared[0]


def _case(search: Search, session: Session, channels: Sequence[str], masks: Sequence[Path]) -> Case:
    source, findings = search.path, search.findings
    images = {channel: _image(session, channel, findings) for channel in channels}
    found = masks_of(source, masks, session.subject, session.session)
    if len(found) > 1:
        names = ", ".join(file.relative_to(source).as_posix() for file in found)
        findings.error(f"{session.name} must have one mask; found {names}")
    files = {channel: path for channel, path in images.items() if path is not None}
    return Case(
        name=case_name(session.name),
        images=tuple(collected(path, findings) for path in files.values()),
        masks=tuple(Mask(collected(path, findings), 1 if is_binary(path) else None) for path in found[:1]),
        path=next((path.relative_to(source).as_posix() for path in files.values()), session.name),
        subject=session.subject,
        covariates=_acquisition(search, files),
    )


def _image(session: Session, channel: str, findings: Findings) -> Path | None:
    found = [path for path in session.images if ends_with(path, channel)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found or session.images)
        findings.error(f"{session.name} must have one image {channel}; found {names}")
    return found[0] if found else None


def _acquisition(search: Search, files: Mapping[str, Path]) -> dict[str, Covariate]:
    """What the side files say; under one name where all channels agree, else one a channel (``echo_time_ms_T1w``)."""
    stated: dict[str, dict[str, float | str]] = {}
    for channel, path in files.items():
        for name, value in _side_facts(search, path).items():
            stated.setdefault(name, {})[channel] = value
    facts: dict[str, Covariate] = {}
    for name, values in stated.items():
        if len(values) == len(files) and len(set(values.values())) == 1:
            facts[name] = next(iter(values.values()))
        else:
            facts.update({f"{name}_{channel}": value for channel, value in values.items()})
    return facts


def _side_facts(search: Search, image: Path) -> dict[str, float | str]:
    stated: dict[str, Any] = {}
    for path in inherited(image, search.path, ".json"):
        stated |= _read_object(path)
    facts: dict[str, float | str] = {}
    for key, (name, factor) in _ACQUISITION.items():
        if key not in stated:
            continue
        if isinstance(stated[key], int | float) and math.isfinite(stated[key]):
            facts[name] = round(stated[key] * factor, 6)
        else:
            search.findings.error(f"{key} of {image.name} must be a number; got {shown(stated[key])}")
    return facts | {name: text for name in search.settings.facts if (text := _side_text(name, stated))}


def _side_text(name: str, stated: Mapping[str, Any]) -> str:
    """Empty where no field states it; a list, as of a kernel and its strength, is joined as in DICOM."""
    value = next((stated[key] for key in _TEXTS.get(name, ()) if stated.get(key)), "")
    text = " ".join(map(str, value if isinstance(value, list) else [value])).strip()
    return as_body_part(text) if name == "body_part" else text


def _participants(search: Search) -> dict[str, dict[str, Covariate]]:
    """Covariates by patient."""
    path = search.path / "participants.tsv"
    if not path.is_file():
        return {}
    columns, records = read_records(path, "participant_id")
    known = covariates([name for name in columns if name != "participant_id"], records, search.findings)
    return {record["participant_id"]: values for record, values in zip(records, known, strict=True)}


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
