"""Split a dataset by patient, once, and read the split back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError, some_of, unknown_choice
from fibldm.files import read_json

SPLITS = ("training", "validation", "test")

SECOND_IMAGE = "second_image"

ANNOTATED = "annotated_labels"
"""The labels that were annotated, of a case of which not all were: what its mask leaves unknown is none of them."""

UNKNOWN_VOXELS = "unknown_voxels"
"""True of such a case whose mask also has voxels of which nothing at all is known (an ignore label)."""

_FILES = ("image", "label", SECOND_IMAGE)
_OF_CASE = (*_FILES, "case", "subject", ANNOTATED, UNKNOWN_VOXELS)
_SHOWN = 3


def load_datalist(work: Path | str, split: str, *, masks: bool = False) -> list[dict[str, Any]]:
    """The cases of one split of a work folder, with absolute paths.

    They lie under ``image`` and, where a case has one, ``label`` and ``second_image``.

    Args:
        work: the folder that ``fibldm prepare`` wrote.
        split: ``training``, ``validation`` or ``test``.
        masks: only the cases that have a mask, of which there must be one.

    Raises:
        FibldmError: unknown split, the folder holds no datalist, a file of a case is gone, or ``masks`` and no case of
            the split has one.
    """
    cases = _cases(work, split, masks=masks)
    gone = [case[key] for case in cases for key in _FILES if key in case and not Path(case[key]).is_file()]
    if gone:
        raise FibldmError(
            f"every file of {work} must be there; {some_of(gone, _SHOWN)} is not",
            "put it back, or make the work folder anew by fibldm prepare --restart",
        )
    return cases


def _cases(work: Path | str, split: str, *, masks: bool = False) -> list[dict[str, Any]]:
    if split not in SPLITS:
        raise unknown_choice("split", split, SPLITS)
    root = Path(work).resolve()
    entries = read_json(root / "datalist.json")[split]
    chosen = [entry for entry in entries if "label" in entry or not masks]
    if entries and not chosen:
        raise FibldmError(
            f"this step needs {split} cases with a mask; none of the {len(entries)} in {work} has one",
            "add masks and run fibldm prepare again; without them go fibldm train autoencoder, and fibldm encode with "
            "--set masks_only=false, for volumes that follow no mask",
        )
    return [entry | {key: str(root / entry[key]) for key in _FILES if key in entry} for entry in chosen]


def read_datalist(work: Path | str) -> dict[str, Any]:
    """The whole of ``datalist.json``, the cases of every split with absolute paths; files may be gone.

    ``channels`` names the image channels in order; a folder written before there could be several has one.

    Raises:
        FibldmError: the folder holds no datalist.
    """
    content: dict[str, Any] = read_json(Path(work) / "datalist.json")
    return {"channels": ["image"]} | content | {split: _cases(work, split) for split in SPLITS}


def known_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """What a datalist says of a case beside its files, name and patient; None is unknown."""
    return {name: value for name, value in case.items() if name not in _OF_CASE}


def annotated_of(case: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The labels of which none is where a case's mask says unknown; ``None`` where nothing is known of these voxels."""
    labels = None if case.get(UNKNOWN_VOXELS) else case.get(ANNOTATED)
    return None if labels is None else tuple(int(label) for label in labels)


def with_annotation(cases: Sequence[Mapping[str, Any]], labels: Sequence[int]) -> list[dict[str, Any]]:
    """Cases as items of a dataset, with ``annotated``: a number for each of ``labels``, 0 where it was not annotated.

    Where nothing is known of a case's unknown voxels, all are 1: its unknown voxels count nowhere.
    """
    known = [annotated_of(case) for case in cases]
    return [
        {**case, "annotated": [int(said is None or label in (0, *said)) for label in labels]}
        for case, said in zip(cases, known, strict=True)
    ]
