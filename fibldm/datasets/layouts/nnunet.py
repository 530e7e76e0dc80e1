"""The raw data of nnU-Net, versions 1 and 2: one file a channel, CASE_0000.nii.gz and so on."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibldm.datasets.findings import Findings
from fibldm.datasets.layouts.entries import case_name, collected, entry_key, path_shown, volume_entries
from fibldm.datasets.layouts.facts import IGNORE, Search, channel_names, describe, label_names, with_unknown
from fibldm.datasets.layouts.segments import known_segments
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError, shown
from fibldm.volumes.formats.readers import SUPPORTED_SUFFIXES

_REMEDY = "give every case NAME the images NAME_0000, NAME_0001, ... and the label NAME"


def is_nnunet(source: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the files follow nnU-Net, where Decathlon's would carry the same names as their labels."""
    if "channel_names" in facts:
        return True
    labels = {entry_key(path) for path in volume_entries(source / "labelsTr")}
    names = (entry_key(path) for path in volume_entries(source / "imagesTr"))
    return any(name.endswith("_0000") and name.removesuffix("_0000") in labels for name in names)


def nnunet(search: Search) -> Source:
    """The cases of imagesTr/ and labelsTr/ (or of the list ``dataset``); those of imagesTs/ have no mask.

    Raises:
        FibldmError: labels are regions, or the ignore label is no value of its own; the file ending is not supported;
            or a channel, image or label is missing (all of them listed).
    """
    facts = search.dataset_json
    channels, ending = channel_names(facts), _file_ending(facts)
    labels, unknown = _labels(facts)
    listed = facts.get("dataset")
    if listed is None:
        cases = _folder_cases(search, ending, len(channels))
    else:
        cases = _listed_cases(search, listed, len(channels))
    if unknown is not None:
        cases = with_unknown(search, cases, unknown)
    unlabelled = _by_case(search.path / "imagesTs", ending, len(channels), search.findings)
    cases += [_case(search, name, images) for name, images in unlabelled.items()]
    cases, segments = known_segments(cases, labels, search.findings)
    named = labels if segments is None else segments
    return describe("nnunet", search, cases, facts, remedy=_REMEDY, channels=channels, labels=named)


def _file_ending(facts: Mapping[str, Any]) -> str:
    ending = facts.get("file_ending", ".nii.gz")
    if ending not in SUPPORTED_SUFFIXES:
        raise FibldmError(
            f"file_ending of dataset.json must be one of {', '.join(SUPPORTED_SUFFIXES)}; got {shown(ending)}"
        )
    return str(ending)


def _labels(facts: Mapping[str, Any]) -> tuple[dict[int, str], int | None]:
    """Names by value, and the value of voxels that were not annotated, ``None`` where there is none."""
    labels = facts.get("labels") or {}
    values = labels if isinstance(labels, dict) else {}
    regions = [str(name) for name, value in values.items() if isinstance(value, list)]
    if regions:
        raise FibldmError(
            f"every label of dataset.json must be one value; {', '.join(regions)} are regions of several values, which "
            "overlap, and a voxel of a label map has one label",
            "name every value of the label maps instead",
        )
    unknown = values.get(IGNORE)
    named = label_names({name: value for name, value in values.items() if name != IGNORE} if values else labels)
    if unknown is not None and (type(unknown) is not int or unknown in (0, *named)):
        raise FibldmError(
            f"the ignore label of dataset.json must be one value that no other label has; got {shown(unknown)}"
        )
    return named, unknown


def _listed_cases(search: Search, listed: Any, channels: int) -> list[Case]:
    if not isinstance(listed, dict):
        raise FibldmError(
            f'dataset of dataset.json must be {{"case": {{"images": [...], "label": ...}}}}; got {shown(listed)}'
        )
    cases = []
    for name, entry in listed.items():
        if _is_entry(entry, channels):
            images = [search.path / image for image in entry["images"]]
            cases.append(_case(search, name, images, search.path / entry["label"]))
        else:
            search.findings.error(f"dataset[{name!r}] must have {channels} images and a label; got {shown(entry, 80)}")
    return cases


def _is_entry(entry: Any, channels: int) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or len(entry["images"]) != channels:
        return False
    return all(isinstance(path, str) for path in (*entry["images"], entry.get("label")))


def _folder_cases(search: Search, ending: str, channels: int) -> list[Case]:
    images = _by_case(search.path / "imagesTr", ending, channels, search.findings)
    labels = {path.name.removesuffix(ending): path for path in volume_entries(search.path / "labelsTr")}
    for name in sorted(images.keys() - labels.keys()):
        search.findings.error(f"imagesTr/{name} has no label")
    for name in sorted(labels.keys() - images.keys()):
        search.findings.error(f"labelsTr/{labels[name].name} has no image")
    return [_case(search, name, images[name], labels[name]) for name in sorted(images.keys() & labels.keys())]


def _by_case(folder: Path, ending: str, channels: int, findings: Findings) -> dict[str, list[Path]]:
    """Image files by case, in the order of the channels."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in volume_entries(folder):
        match = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(ending)) if path.name.endswith(ending) else None
        if match is None:
            findings.error(f"{path_shown(path)} must be called NAME_0000{ending}, the number that of its channel")
        else:
            found[match[1]][int(match[2])] = path
    for name, files in found.items():
        if sorted(files) != list(range(channels)):
            got = ", ".join(f"{index:04}" for index in sorted(files))
            findings.error(f"{folder.name}/{name} must have channels 0000 to {channels - 1:04}; got {got}")
    return {name: [files[index] for index in sorted(files)] for name, files in found.items()}


def _case(search: Search, name: str, images: Sequence[Path], label: Path | None = None) -> Case:
    files = tuple(collected(image, search.findings) for image in images)
    masks = () if label is None else (Mask(collected(label, search.findings)),)
    inside = images[0].is_relative_to(search.path)
    path = images[0].relative_to(search.path) if inside else images[0]
    return Case(case_name(name), files, masks, path.as_posix())
