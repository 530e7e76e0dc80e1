"""What every layout ends with: all findings of all cases raised at once, and the dataset described."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fibldm.datasets.layouts.entries import repeated
from fibldm.datasets.source import Case, Source
from fibldm.errors import FibldmError
from fibldm.files import read_json

REFERENCE_KEYS = ("description", "reference", "attribution")
_LISTED = 5


def check_cases(cases: Sequence[Case], problems: Sequence[str], source: Path, remedy: str) -> None:
    """Raise what the layout found wrong, with names that are not unique, as one error.

    Raises:
        FibldmError: there are ``problems``, a name stands for several cases, or there is no case.
    """
    private = {case.name.lower() for case in cases if case.private}
    found = list(problems) + [
        f"the name {'of a DICOM case' if name in private else name} stands for {count} cases"
        for name, count in repeated(case.name for case in cases)
    ]
    if not cases and not found:
        found.append("no case was found")
    if found:
        listed = "".join(f"\n  {problem}" for problem in found)
        raise FibldmError(
            f"every case of {source} must have one image and at most one label, under a name of its own; "
            f"{len(found)} findings:{listed}",
            remedy,
        )


def left_out(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """A note with count and names of what a layout leaves out; none where that is nothing."""
    listed = sorted(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return (f"{len(listed)} {what} were left out: {', '.join(listed[:_LISTED])}{more}",) if listed else ()


def describe(
    layout: str,
    source: Path,
    cases: Sequence[Case],
    facts: Mapping[str, Any],
    *,
    notes: tuple[str, ...] = (),
    channels: tuple[str, ...] | None = None,
    labels: Mapping[int, str] | None = None,
) -> Source:
    """The dataset with what its ``dataset.json`` says.

    Args:
        layout: its name.
        source: the dataset, which gives the name where ``facts`` do not.
        cases: in any order.
        facts: content of ``dataset.json``, or what the layout has in its place under the same keys.
        notes: what was left out.
        channels: names of the channels; ``None`` takes those of ``facts``.
        labels: names by value; ``None`` takes those of ``facts``.

    Raises:
        FibldmError: channels or labels of ``facts`` are not what they must be.
    """
    return Source(
        layout=layout,
        name=str(facts.get("name") or source.resolve().name),
        cases=tuple(sorted(cases, key=lambda case: case.name)),
        channels=channel_names(facts) if channels is None else channels,
        modality=", ".join(channel_names(facts)) if _channels_of(facts) else None,
        labels=label_names(facts.get("labels") or {}) if labels is None else labels,
        licence=str(facts.get("licence") or facts.get("license") or "") or None,
        references={key: str(facts[key]) for key in REFERENCE_KEYS if facts.get(key)},
        notes=notes,
    )


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """The content of ``dataset.json`` in ``folder``.

    Raises:
        FibldmError: the file is missing or holds no JSON object.
    """
    facts = read_json(folder / "dataset.json")
    if not isinstance(facts, dict):
        raise FibldmError(f"{folder / 'dataset.json'} must hold an object; got {type(facts).__name__}")
    return facts


def beside(folder: Path) -> dict[str, Any]:
    """The content of ``dataset.json`` in ``folder``, empty where there is none.

    Raises:
        FibldmError: the file holds no JSON object.
    """
    return read_dataset_json(folder) if (folder / "dataset.json").is_file() else {}


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
        raise FibldmError(f'the channels of dataset.json must be {{"0": "T1", "1": "FLAIR", ...}}; got {channels!r}')
    names = {str(key): str(name) for key, name in channels.items()}
    if len({name.lower() for name in names.values()}) < len(names):
        raise FibldmError(f"the channels of dataset.json must have names of their own; got {channels!r}")
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
            f'labels of dataset.json must be {{"0": "background", "1": "name", ...}}; got {labels!r}'
        ) from error


def _channels_of(facts: Mapping[str, Any]) -> Any:
    return facts.get("channel_names") or facts.get("modality")
