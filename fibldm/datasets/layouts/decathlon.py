"""The Medical Segmentation Decathlon: dataset.json lists images and labels, one file a case."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibldm.datasets.layouts.entries import case_name, collected, entry_key, volume_entries
from fibldm.datasets.layouts.facts import Search, describe
from fibldm.datasets.layouts.segments import known_segments
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError, shown
from fibldm.volumes.datalist import ANNOTATED
from fibldm.volumes.scan import Covariate


def decathlon(search: Search) -> Source:
    """The cases that ``dataset.json`` lists; those of its test list (else of imagesTs/) have no mask.

    Raises:
        FibldmError: there is no training list, an entry is wrong, or a file is missing (all of them listed).
    """
    facts, findings = search.dataset_json, search.findings
    entries = facts.get("training")
    if not isinstance(entries, list) or not entries:
        raise FibldmError(
            f"{search.path / 'dataset.json'} must have a list 'training' of {{image, label}} entries; "
            f"got {shown(entries)}"
        )
    for index, entry in enumerate(entries):
        if not _is_pair(entry):
            findings.error(f"training[{index}] must be an object with image and label; got {shown(entry, 80)}")
    cases = [_case(search, entry) for entry in entries if _is_pair(entry)]
    unlabelled = _unlabelled(search)
    present = [image for image in unlabelled if (search.path / image).exists()]
    cases += [_case(search, {"image": image}) for image in present]
    cases, segments = known_segments(cases, search.label_names, findings)
    if absent := len(unlabelled) - len(present):
        findings.notes.append(f"images of the test list that do not exist are left out: {absent}")
    if isinstance(facts.get("validation"), list):
        findings.notes.append(f"the list validation of dataset.json is left out: {len(facts['validation'])} entries")
    search.leave_out("images that dataset.json does not list", _unlisted(search.path, cases))
    return describe(
        "decathlon", search, cases, facts, remedy="give every file of the training list its own name", labels=segments
    )


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("image", "label"))


def _case(search: Search, entry: Mapping[str, Any]) -> Case:
    image, label = entry["image"], entry.get("label")
    files = collected(search.path / image, search.findings)
    masks = () if label is None else (Mask(collected(search.path / label, search.findings)),)
    name, covariates = case_name(entry_key(Path(image))), _text(search, entry)
    if entry.get(ANNOTATED) is not None:
        covariates[ANNOTATED] = entry[ANNOTATED]
    return Case(name, (files,), masks, Path(image).as_posix(), covariates=covariates)


def _text(search: Search, entry: Mapping[str, Any]) -> dict[str, Covariate]:
    """The text of an entry, by the key that is asked for."""
    key = search.settings.text
    if key is None or key not in entry:
        return {}
    value = entry[key]
    if value is not None and not isinstance(value, str):
        search.findings.error(f"{key} of {entry['image']} must be a text; got {type(value).__name__}")
    return {key: value or None} if isinstance(value, str) else {key: None}


def _unlabelled(search: Search) -> list[str]:
    """Paths of the images without a label, as the dataset gives them."""
    folder = search.path / "imagesTs"
    listed = search.facts.get("test") or [f"imagesTs/{path.name}" for path in volume_entries(folder)]
    if not isinstance(listed, list):
        search.findings.error(f"the test list must be a list of images; got {shown(listed)}")
        return []
    images = [entry.get("image") if isinstance(entry, dict) else entry for entry in listed]
    for index, image in enumerate(images):
        if not isinstance(image, str):
            search.findings.error(f"test[{index}] must be the path of an image; got {shown(listed[index], 80)}")
    return [image for image in images if isinstance(image, str)]


def _unlisted(source: Path, cases: Sequence[Case]) -> list[str]:
    """Images beside those that dataset.json lists, and in its test folder."""
    files = {file.resolve() for case in cases for file in case.files}
    used = files | {folder for file in files for folder in file.parents}
    folders = (source / "imagesTr", source / "imagesTs")
    return [f"{f.name}/{path.name}" for f in folders for path in volume_entries(f) if path.resolve() not in used]
