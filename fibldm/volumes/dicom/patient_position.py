"""How a patient lay in the scanner, as the standard wants it said: a code string of CT and MR, coded terms of PET."""

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

PATIENT_POSITIONS = ("HFS", "HFP", "HFDR", "HFDL", "FFS", "FFP", "FFDR", "FFDL")
"""Head or feet first; supine, prone, or lying on the right or left side (decubitus)."""

_FIRST = {"HF": codes.SCT.Headfirst, "FF": codes.SCT.FeetFirst}
_LYING = {
    "S": codes.SCT.Supine,
    "P": codes.SCT.Prone,
    "DR": codes.SCT.RightLateralDecubitus,
    "DL": codes.SCT.LeftLateralDecubitus,
}


def state_position(dataset: Dataset, position: str) -> None:
    """Write one of `PATIENT_POSITIONS`, or that none is known (empty); PET may not have both ways of saying it."""
    if dataset.Modality != "PT":
        dataset.PatientPosition = position
        return
    dataset.pop("PatientPosition", None)
    orientation = _coded(codes.SCT.Recumbent) if position else None
    if orientation is not None:
        orientation.PatientOrientationModifierCodeSequence = Sequence([_coded(_LYING[position[2:]])])
    dataset.PatientOrientationCodeSequence = Sequence([orientation] if orientation is not None else [])
    first = [_coded(_FIRST[position[:2]])] if position else []
    dataset.PatientGantryRelationshipCodeSequence = Sequence(first)


def _coded(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item
