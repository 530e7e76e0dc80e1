"""What every layout begins and ends with: where a dataset is looked for, and what is found, described or refused."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fibldm.datasets.findings import Findings
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.source import Case, Source
from fibldm.errors import FibldmError, shown
from fibldm.files import read_json

IGNORE = "ignore"
"""What the label of voxels that were not annotated is called, as in nnU-Net."""

REFERENCE_KEYS = ("description", "reference", "attribution")
_LISTED = 5


@dataclass(frozen=True)
class Search:
    """A dataset that is looked for.

    Attributes:
        path: folder, or the one file of a dataset.
        settings: what the user decides.
        findings: gets what is wrong, and what is left out.
    """

    path: Path
    settings: PrepareSettings
    findings: Findings = field(default_factory=Findings)

    @cached_property
    def dataset_json(self) -> dict[str, Any]:
        """The content of ``dataset.json`` in the folder of the dataset.

        Raises:
            FibldmError: the file is missing or holds no JSON object.
        """
        facts = read_json(self._file)
        if not isinstance(facts, dict):
            raise FibldmError(f"{self._file} must hold an object; got {type(facts).__name__}")
        return facts

    @property
    def facts(self) -> dict[str, Any]:
        """The same, empty where there is no such file."""
        return self.dataset_json if self._file.is_file() else {}

    @property
    def label_names(self) -> dict[int, str]:
        """Names of labels by value, as ``dataset.json`` gives them."""
        return label_names(self.facts.get("labels") or {})

    def leave_out(self, what: str, names: Iterable[str]) -> None:
        """Note how many of what are left out, and the first names; nothing where there are none."""
        listed = sorted(names)
        more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        if listed:
            self.findings.notes.append(f"{len(listed)} {what} were left out: {', '.join(listed[:_LISTED])}{more}")

    @property
    def _file(self) -> Path:
        return (self.path.parent if self.path.is_file() else self.path) / "dataset.json"


def describe(
    layout: str,
    search: Search,
    cases: Sequence[Case],
    facts: Mapping[str, Any],
    *,
    remedy: str,
    channels: tuple[str, ...] | None = None,
    labels: Mapping[int, str] | None = None,
) -> Source:
    """The dataset that was found, unless something is wrong with it, which is raised as one error.

    Args:
        layout: its name.
        search: the dataset, which gives the name where ``facts`` do not, what is wrong and what was left out.
        cases: in any order.
        facts: content of ``dataset.json``, or what the layout has in its place under the same keys.
        remedy: what can be done about errors.
        channels: names of the channels; ``None`` takes those of ``facts``.
        labels: names by value; ``None`` takes those of ``facts``.

    Raises:
        FibldmError: there are findings, a name stands for several cases, there is no case, or channels or labels of
            ``facts`` are not what they must be.
    """
    _check(cases, search, remedy)
    return Source(
        layout=layout,
        name=str(facts.get("name") or search.path.resolve().name),
        cases=tuple(sorted(cases, key=lambda case: case.name)),
        channels=channel_names(facts) if channels is None else channels,
        modality=", ".join(channel_names(facts)) if _channels_of(facts) else None,
        labels=label_names(facts.get("labels") or {}) if labels is None else labels,
        licence=str(facts.get("licence") or facts.get("license") or "") or None,
        references={key: str(facts[key]) for key in REFERENCE_KEYS if facts.get(key)},
        notes=tuple(search.findings.notes),
    )


def _check(cases: Sequence[Case], search: Search, remedy: str) -> None:
    findings = search.findings
    private = {case.name.lower() for case in cases if case.private}
    for name, count in sorted(Counter(case.name.lower() for case in cases).items()):
        if count > 1:
            findings.error(f"the name {'of a DICOM case' if name in private else name} stands for {count} cases")
    if not cases and not findings.listed:
        findings.error("no case was found")
    if findings.listed:
        raise FibldmError(
            f"every case of {search.path} must have one image and at most one label, under a name of its own; "
            f"{len(findings.listed)} findings:{findings.lines()}",
            remedy,
        )


def with_unknown(search: Search, cases: Sequence[Case], value: int) -> list[Case]:
    """The cases whose masks have a value for voxels that were not annotated, which is noted."""
    search.findings.notes.append(f"voxels of the ignore label ({value}) are unknown")
    return [replace(case, masks=tuple(replace(mask, unknown=value) for mask in case.masks)) for case in cases]


def channel_names(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the channels in order, from ``modality`` (or nnU-Net's ``channel_names``) of a ``dataset.json``.

    Raises:
        FibldmError: they are not numbered from 0, or two have the same name.
    """
    channels = _channels_of(facts)
    if not channels:
        return ("image",)
    if isinstance(channels, str):
        return (channels,)
    expected = [str(index) for index in range(len(channels))] if isinstance(channels, dict) else []
    if not expected or set(map(str, channels)) != set(expected):
        raise FibldmError(
            f'the channels of dataset.json must be {{"0": "T1", "1": "FLAIR", ...}}; got {shown(channels, 80)}'
        )
    names = {str(key): str(name) for key, name in channels.items()}
    if len({name.lower() for name in names.values()}) < len(names):
        raise FibldmError(f"the channels of dataset.json must have names of their own; got {shown(channels, 80)}")
    return tuple(names[key] for key in expected)


def label_names(labels: Any) -> dict[int, str]:
    """Names by value, without background; Decathlon writes ``{"1": "name"}``, nnU-Net ``{"name": 1}``.

    Raises:
        FibldmError: they are neither.
    """
    try:
        pairs = [(name, value) if isinstance(value, int) else (value, name) for name, value in labels.items()]
        return {int(value): str(name) for name, value in pairs if int(value) != 0}
    except (AttributeError, TypeError, ValueError) as error:
        raise FibldmError(
            f'labels of dataset.json must be {{"0": "background", "1": "name", ...}}; got {shown(labels, 80)}'
        ) from error


def _channels_of(facts: Mapping[str, Any]) -> Any:
    return facts.get("channel_names") or facts.get("modality")
