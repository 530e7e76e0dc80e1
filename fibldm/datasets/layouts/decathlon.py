"""The Medical Segmentation Decathlon: dataset.json lists images and labels, one file a case."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibldm.datasets.layouts.entries import case_name, collected, entry_key, volume_entries
from fibldm.datasets.layouts.facts import check_cases, describe, label_names, left_out, read_dataset_json
from fibldm.datasets.layouts.segments import known_segments
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError
from fibldm.volumes.scan import Covariate


def decathlon(source: Path, text: str | None = None) -> Source:
    """The cases that ``dataset.json`` lists; those of its test list (else of imagesTs/) have no mask.

    Args:
        source: folder of the dataset.
        text: key of a text in the entries, which becomes a covariate of that name; None of none.

    Raises:
        FibldmError: there is no training list, an entry is wrong, or a file is missing (all of them listed).
    """
    facts = read_dataset_json(source)
    entries = facts.get("training")
    if not isinstance(entries, list) or not entries:
        raise FibldmError(
            f"{source / 'dataset.json'} must have a list 'training' of {{image, label}} entries; got {entries!r}"
        )
    problems = [
        f"training[{index}] must be an object with image and label; got {entry!r}"
        for index, entry in enumerate(entries)
        if not _is_pair(entry)
    ]
    cases = [
        _case(source, entry["image"], entry["label"], problems, _covariates(entry, text, problems))
        for entry in entries
        if _is_pair(entry)
    ]
    unlabelled = _unlabelled(source, facts, problems)
    present = [image for image in unlabelled if (source / image).exists()]
    cases += [_case(source, image, None, problems) for image in present]
    cases, segments = known_segments(cases, label_names(facts.get("labels") or {}), problems)
    check_cases(cases, problems, source, "give every file of the training list its own name")
    notes = (*_notes(facts, absent=len(unlabelled) - len(present)), *_unlisted(source, cases))
    return describe("decathlon", source, cases, facts, notes=notes, labels=segments)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("image", "label"))


def _case(
    source: Path,
    image: str,
    label: str | None,
    problems: list[str],
    covariates: Mapping[str, Covariate] | None = None,
) -> Case:
    files = collected(source / image, problems)
    masks = () if label is None else (Mask(collected(source / label, problems)),)
    name, path = case_name(entry_key(Path(image))), Path(image).as_posix()
    return Case(name, (files,), masks, path, covariates=covariates or {})


def _covariates(entry: Mapping[str, Any], text: str | None, problems: list[str]) -> dict[str, Covariate]:
    """The text of an entry, by its key."""
    if text is None or text not in entry:
        return {}
    value = entry[text]
    if value is not None and not isinstance(value, str):
        problems.append(f"{text} of {entry['image']} must be a text; got {type(value).__name__}")
    return {text: value or None} if isinstance(value, str) else {text: None}


def _unlabelled(source: Path, facts: Mapping[str, Any], problems: list[str]) -> list[str]:
    """Paths of the images without a label, as the dataset gives them."""
    listed = facts.get("test") or [f"imagesTs/{path.name}" for path in volume_entries(source / "imagesTs")]
    if not isinstance(listed, list):
        problems.append(f"the test list must be a list of images; got {listed!r}")
        return []
    images = [entry.get("image") if isinstance(entry, dict) else entry for entry in listed]
    problems += [
        f"test[{index}] must be the path of an image; got {listed[index]!r}"
        for index, image in enumerate(images)
        if not isinstance(image, str)
    ]
    return [image for image in images if isinstance(image, str)]


def _unlisted(source: Path, cases: Sequence[Case]) -> tuple[str, ...]:
    """Images beside those that dataset.json lists, and in its test folder."""
    files = {file.resolve() for case in cases for file in case.files}
    folders = (source / "imagesTr", source / "imagesTs")
    names = (f"{f.name}/{path.name}" for f in folders for path in volume_entries(f) if _is_unused(path, files))
    return left_out("images that dataset.json does not list", names)


def _is_unused(path: Path, files: set[Path]) -> bool:
    return path.resolve() not in files and not any(path.resolve() in file.parents for file in files)


def _notes(facts: Mapping[str, Any], *, absent: int) -> tuple[str, ...]:
    notes = []
    if absent:
        notes.append(f"images of the test list that do not exist are left out: {absent}")
    if isinstance(facts.get("validation"), list):
        notes.append(f"the list validation of dataset.json is left out: {len(facts['validation'])} entries")
    return tuple(notes)
