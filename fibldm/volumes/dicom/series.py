"""DICOM series: found among files, and read as a volume or refused.

pydicom decodes, highdicom gives the affine; what is refused, and why, is decided here. Messages name slices by their
number and their place in mm, never a patient, a date, a UID or a path.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.volumes.dicom.files import holds_dicom
from fibldm.volumes.dicom.frames import MODALITIES, Frame, is_localizer, read_dataset, read_frames, sop_class, uid_name
from fibldm.volumes.dicom.pixels import read_voxels, unreadable
from fibldm.volumes.dicom.stack import stacked
from fibldm.volumes.dicom.suv import suv_factors, suv_problems
from fibldm.volumes.grid import Volume
from fibldm.volumes.scan import ACQUISITION, Covariate, Scan, as_body_part

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_DIRECTORY = "1.2.840.10008.1.3.10"
MASKS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "SEG",
    "1.2.840.10008.5.1.4.1.1.66.7": "SEG",
    "1.2.840.10008.5.1.4.1.1.481.3": "RTSTRUCT",
}
"""Modality by SOP class, of the classes that hold masks."""
_FOUND = (
    "SOPClassUID SOPInstanceUID Modality ImageType PatientID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID "
    "ReferencedSeriesSequence ReferencedFrameOfReferenceSequence"
).split()
_NUMBERS = {
    "slice_thickness_mm": ("SliceThickness",),
    "tube_voltage_kv": ("KVP",),
    "field_strength_t": ("MagneticFieldStrength",),
    "repetition_time_ms": ("RepetitionTime",),
    "echo_time_ms": ("EchoTime", "EffectiveEchoTime"),
}
_NO_CONTRAST = {"NO", "NONE", "N", "NO CONTRAST", "WITHOUT CONTRAST", "NON CONTRAST"}
_RESPIRATION = {"inspiration": r"\binsp(iration|iratory)?\b", "expiration": r"\bexpir(ation|atory)\b"}


@dataclass(frozen=True)
class Series:
    """A DICOM series as found; IDs and UIDs are for linking in memory and are written nowhere.

    Attributes:
        uid: Series Instance UID; where the files leave it empty, a name made of their content.
        patient_id: may be empty.
        study_uid: may be empty.
        frame_of_reference: UID of its coordinate system; may be empty.
        modality: "CT", "MR", "PT", "SEG", "RTSTRUCT", …, as the files say; where they do not, by their kind of object.
        sop_class: UID of the kind of object.
        files: sorted; without scouts where there are other images.
        localizer: whether it holds scouts only.
        referenced_series: UIDs of the series that a segmentation or structure set refers to.
        frames_of_reference: UIDs of all; a structure set may have several.
    """

    uid: str
    patient_id: str
    study_uid: str
    frame_of_reference: str
    modality: str
    sop_class: str
    files: tuple[Path, ...]
    localizer: bool = False
    referenced_series: tuple[str, ...] = ()
    frames_of_reference: tuple[str, ...] = ()

    @property
    def image(self) -> bool:
        """Whether `read_series` may read it: images of CT, MR or PET, and no scouts."""
        return self.sop_class in MODALITIES and not self.localizer


def find_series(files: Iterable[Path]) -> list[Series]:
    """The series among files, from their headers alone, sorted by patient, study and series.

    Files that are no DICOM and DICOMDIR are passed over. Files of one series that are of several kinds of object, or
    without a Series Instance UID in several folders, are several series.

    Raises:
        FibldmError: DICOM files cannot be read or parsed.
    """
    groups: dict[tuple[str, ...], list[tuple[Path, Dataset]]] = defaultdict(list)
    broken = 0
    for file in sorted(files):
        try:
            header = _header(file)
        except Exception:
            broken += 1
            continue
        if header is not None:
            groups[_key(file, header)].append((file, header))
    if broken:
        message = f"DICOM files must be readable; {broken} of those found cannot be opened or parsed"
        raise FibldmError(message, "check their permissions, or transfer them again")
    found = [_series(members) for members in groups.values()]
    return sorted(found, key=lambda series: (series.patient_id, series.study_uid, series.uid, series.files))


def read_series(files: Sequence[Path], *, resample_tilt: bool = False, suv: bool = False) -> Scan:
    """Read one series, its files in any order, as a volume in RAS+; the place of a slice decides, not its number.

    CT comes in HU, PET in its units, each slice by its own rescale; int16 where that is exact, else float32. Scouts
    among other images are left out. A single slice becomes ``(X, Y, 1)`` of its slice thickness (its thin axis is the
    one closest to the normal). An enhanced multi-frame image is read as its frames.

    Args:
        files: of the series.
        resample_tilt: whether slices that a tilted gantry shears, or that lie at uneven distances, are brought to a
            regular grid (`fibldm.volumes.dicom.acquired`); a finding and `Scan.acquired` then say so.
        suv: whether PET is brought to SUV by body weight (`fibldm.volumes.dicom.suv`), in float32 with padding 0.

    Raises:
        FibldmError: it is not one volume of parallel, evenly spaced slices in known units, or its voxels cannot be
            decoded; all reasons that the headers give are named.
    """
    frames = read_frames(files)
    images = [frame for frame in frames if not frame.localizer]
    modality = _modality(images)
    suv = suv and modality == "PT"
    problems = [*unreadable(images, modality), *(suv_problems(images) if suv else ())]
    stack = stacked(images, problems, resample=resample_tilt)
    ordered, acquired = stack.frames, stack.acquired
    voxels = read_voxels(ordered, modality)
    if suv:
        voxels = voxels.scaled(suv_factors(ordered))
    findings, array = voxels.findings, voxels.array
    if acquired is not None:
        array = acquired.image(array, voxels.background)
        findings = (*findings, ("warning", str(acquired)))
    volume = Volume(array.transpose(2, 1, 0), stack.affine).canonical()
    if scouts := len(frames) - len(images):
        line = f"{scouts} localizers (scouts) under the same series were left out"
        findings = (("warning", line), *findings)
    facts, frame = _facts(ordered), _text(ordered[0].header, "FrameOfReferenceUID")
    return Scan(
        volume.array,
        volume.affine,
        voxels.sha256,
        facts,
        findings,
        modality=modality,
        frame_of_reference=frame,
        acquired=acquired,
    )


def _header(file: Path) -> "Dataset | None":
    """The header of a DICOM file; ``None`` for other files and DICOMDIR."""
    if not holds_dicom(file):
        return None
    header = read_dataset(file, _FOUND)
    if not sop_class(header):
        raise ValueError("a DICOM file must say what kind of object it holds")
    return None if sop_class(header) == _DIRECTORY else header


def _key(file: Path, header: "Dataset") -> tuple[str, ...]:
    uid, modality = _text(header, "SeriesInstanceUID"), _modality_of(header)
    return (uid or f"{file.parent}", _text(header, "StudyInstanceUID"), modality, "" if uid else sop_class(header))


def _series(members: list[tuple[Path, "Dataset"]]) -> Series:
    kept = [(file, header) for file, header in members if not is_localizer(header)] or members
    first = kept[0][1]
    return Series(
        uid=_text(first, "SeriesInstanceUID") or f"unnamed-{hash_file(kept[0][0])[:16]}",
        patient_id=_text(first, "PatientID"),
        study_uid=_text(first, "StudyInstanceUID"),
        frame_of_reference=next(filter(None, _frames_of_reference(first)), ""),
        frames_of_reference=tuple(dict.fromkeys(filter(None, _frames_of_reference(first)))),
        modality=_modality_of(first),
        sop_class=sop_class(first),
        files=tuple(file for file, _ in kept),
        localizer=is_localizer(first),
        referenced_series=tuple(sorted({uid for _, header in kept for uid in _referenced(header)})),
    )


def _text(header: "Dataset", keyword: str) -> str:
    return str(header.get(keyword) or "").strip()


def _modality_of(header: "Dataset") -> str:
    return _text(header, "Modality") or MODALITIES.get(sop_class(header)) or MASKS.get(sop_class(header), "")


def _frames_of_reference(header: "Dataset") -> Iterator[str]:
    yield _text(header, "FrameOfReferenceUID")
    for reference in header.get("ReferencedFrameOfReferenceSequence") or ():
        yield _text(reference, "FrameOfReferenceUID")


def _referenced(header: "Dataset") -> Iterator[str]:
    for series in header.get("ReferencedSeriesSequence") or ():
        yield _text(series, "SeriesInstanceUID")
    for reference in header.get("ReferencedFrameOfReferenceSequence") or ():
        for study in reference.get("RTReferencedStudySequence") or ():
            for series in study.get("RTReferencedSeriesSequence") or ():
                yield _text(series, "SeriesInstanceUID")


def _modality(images: Sequence[Frame]) -> str:
    if not images:
        raise FibldmError("a DICOM series must be a volume; it holds localizers (scouts) only", "leave it out")
    for frame in images:
        if frame.sop_class not in MODALITIES:
            kind = uid_name(frame.sop_class)
            message = f"a DICOM series must hold images of CT, MR or PET; its kind of object is {kind}"
            raise FibldmError(message, "leave it out, or transfer it again if it is an image")
    return MODALITIES[images[0].sop_class]


def _facts(frames: Sequence[Frame]) -> dict[str, Covariate]:
    """Of `ACQUISITION`, what all frames state alike."""
    stated = [_stated(frame) for frame in frames]
    named = [name for name in ACQUISITION if name in stated[0]]
    return {name: stated[0][name] for name in named if all(facts.get(name) == stated[0][name] for facts in stated)}


def _stated(frame: Frame) -> dict[str, Covariate]:
    facts: dict[str, Covariate] = {}
    for name, keywords in _NUMBERS.items():
        values = [value[0] for keyword in keywords if (value := frame.numbers(keyword))]
        facts |= {name: values[0]} if values else {}
    kernel, contrast, respiration = frame.text("ConvolutionKernel"), _contrast(frame), _respiration(frame)
    texts = {"kernel": kernel, "contrast": contrast, "respiration": respiration}
    texts["body_part"] = as_body_part(frame.text("BodyPartExamined"))
    return facts | {name: text for name, text in texts.items() if text}


def _contrast(frame: Frame) -> str:
    """An empty or absent agent says nothing: the standard lets it be empty where it is not known."""
    if agent := frame.text("ContrastBolusAgent").upper():
        return "no" if agent in _NO_CONTRAST else "yes"
    return "yes" if frame.header.get("ContrastBolusAgentSequence") else ""


def _respiration(frame: Frame) -> str:
    text = f"{frame.text('SeriesDescription')} {frame.text('ProtocolName')}".lower().replace("_", " ")
    stated = [name for name, pattern in _RESPIRATION.items() if re.search(pattern, text)]
    return stated[0] if len(stated) == 1 else ""
