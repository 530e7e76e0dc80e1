"""Several datasets as one: a common legend by the names of the labels, and what a dataset lacks was not annotated."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fibldm import UNKNOWN_LABEL
from fibldm.datasets.annotated import with_annotated
from fibldm.datasets.layouts import find_source
from fibldm.datasets.layouts.entries import case_name
from fibldm.datasets.modalities import stated_modality
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.source import Case, Mask, Source
from fibldm.errors import FibldmError

DATASET = "dataset"
"""The covariate that says which dataset a case is of."""

_SHOWN = 5


def joined_sources(paths: Sequence[Path], settings: PrepareSettings) -> tuple[Source, PrepareSettings]:
    """The cases of several datasets as one dataset, and the settings for it.

    Labels are the same where their names are, whatever their values, capitals, spaces, dashes and underscores. They are
    numbered as the settings ask, then in the order of the datasets. A label that a dataset does not have was not
    annotated in its cases. Cases get the covariate `DATASET`. Cases of one name in two datasets count as one patient.

    Args:
        paths: of the datasets.
        settings: of all of them; labels are those of the common legend.

    Raises:
        FibldmError: a dataset cannot be found, or they cannot be joined: other modalities or channels, labels without a
            name or with one twice, a split in some of them only.
    """
    if settings.remap:
        raise FibldmError(
            "`remap` changes label values, which each of several datasets has of its own; their labels are matched by "
            "their names",
            "leave it out, and name the labels alike in the dataset.json of each",
        )
    names = _dataset_names(paths)
    found = {name: find_source(path, settings) for name, path in zip(names, paths, strict=True)}
    modality = _one_modality(found)
    legend = _common_legend({name: source.labels for name, source in found.items()}, settings.labels)
    _check_named(found)
    _check_splits(found)
    shared = _shared_names(found.values())
    cases: list[Case] = []
    for name, source in found.items():
        values = {value: legend[_plain(label)][0] for value, label in source.labels.items()}
        own = with_annotated(source.cases, source.labels, {})
        own = [_in_legend(case, values, settings.missing_is_unknown) for case in own]
        cases += [_told_apart(case, name, shared, settings) for case in own]
    notes = [_told_legend(legend, found)]
    notes += [f"{name}: {note}" for name, source in found.items() for note in source.notes]
    if shared:
        notes.append(f"{len(shared)} names of cases are in several datasets; cases of one name count as one patient")
    joined = Source(
        layout=", ".join(dict.fromkeys(source.layout for source in found.values())),
        name=" + ".join(dict.fromkeys(source.name for source in found.values())),
        cases=tuple(sorted(_with_all_columns(cases), key=lambda case: case.name)),
        channels=_one_row_of_channels(found),
        modality=modality,
        labels=dict(sorted(legend.values())),
        licence=_together(source.licence for source in found.values()),
        references=_references(found.values()),
        notes=tuple(notes),
    )
    return joined, replace(settings, labels={})


def _dataset_names(paths: Sequence[Path]) -> list[str]:
    """The name of each folder or file, with a number behind it where several have the same."""
    named = [case_name(path.resolve().stem if path.is_file() else path.resolve().name) for path in paths]
    counts = Counter(named)
    return [
        f"{name}_{named[: index + 1].count(name)}" if counts[name] > 1 else name for index, name in enumerate(named)
    ]


def _one_modality(found: Mapping[str, Source]) -> str | None:
    stated = {name: stated_modality(source) for name, source in found.items()}
    known = {modality for modality in stated.values() if modality is not None}
    if len(known) > 1:
        listed = ", ".join(f"{name} {modality}" for name, modality in stated.items() if modality)
        raise FibldmError(
            f"datasets that are prepared together must be of one modality; they say {listed}",
            "prepare and train them apart: a run knows one range of intensities",
        )
    return next((source.modality for name, source in found.items() if stated[name]), None)


def _one_row_of_channels(found: Mapping[str, Source]) -> tuple[str, ...]:
    rows = list(dict.fromkeys(source.channels for source in found.values()))
    if len(rows) == 1:
        return rows[0]
    if all(len(row) == 1 for row in rows):
        return ("image",)
    listed = "; ".join(f"{name}: {', '.join(source.channels)}" for name, source in found.items())
    raise FibldmError(f"datasets that are prepared together must have the same channels; got {listed}")


def _common_legend(labels: Mapping[str, Mapping[int, str]], asked: Mapping[int, str]) -> dict[str, tuple[int, str]]:
    """Value and name of each label, by its plain name."""
    for dataset, names in labels.items():
        counts = Counter(map(_plain, names.values()))
        if twice := [name for name in names.values() if counts[_plain(name)] > 1]:
            raise FibldmError(f"every label of {dataset} must have a name of its own; {', '.join(twice)} are the same")
    held = {_plain(name): name for names in labels.values() for name in names.values()}
    if strange := [name for name in asked.values() if _plain(name) not in held]:
        raise FibldmError(
            f"`labels` must name labels of the datasets; none has {', '.join(strange)}, they have "
            f"{', '.join(held.values())}"
        )
    legend = {_plain(name): (value, name) for value, name in asked.items()}
    free = iter(value for value in range(1, UNKNOWN_LABEL) if value not in asked)
    for names in labels.values():
        for _, name in sorted(names.items()):
            if _plain(name) not in legend:
                if (value := next(free, None)) is None:
                    raise FibldmError(f"datasets may have at most {UNKNOWN_LABEL - 1} labels together; they have more")
                legend[_plain(name)] = (value, name)
    return legend


def _told_legend(legend: Mapping[str, tuple[int, str]], found: Mapping[str, Source]) -> str:
    having = {
        plain: [name for name, source in found.items() if plain in map(_plain, source.labels.values())]
        for plain in legend
    }
    rows = sorted((value, f"{value} {label} ({', '.join(having[plain])})") for plain, (value, label) in legend.items())
    return f"common legend: {'; '.join(row for _, row in rows)}"


def _plain(name: str) -> str:
    """A name without capitals, and with one space for spaces, dashes and underscores."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _check_named(found: Mapping[str, Source]) -> None:
    bare = [name for name, source in found.items() if not source.labels and any(case.masks for case in source.cases)]
    if bare:
        raise FibldmError(
            f"labels of several datasets are matched by their names; {', '.join(bare)} names no label of its masks",
            'put a dataset.json beside its data: {"labels": {"1": "tumour"}}',
        )


def _check_splits(found: Mapping[str, Source]) -> None:
    given = {name: any(case.split is not None for case in source.cases) for name, source in found.items()}
    if any(given.values()) and not all(given.values()):
        with_split, without = ([name for name, has in given.items() if has is wanted] for wanted in (True, False))
        raise FibldmError(
            f"all datasets must give a split, or none; {', '.join(with_split)} gives one, {', '.join(without)} none",
            "leave the column split out to have one drawn, or give it everywhere",
        )


def _shared_names(sources: Iterable[Source]) -> set[str]:
    counts = Counter(name for source in sources for name in {case.name.lower() for case in source.cases})
    return {name for name, count in counts.items() if count > 1}


def _in_legend(case: Case, values: Mapping[int, int], missing_is_unknown: bool) -> Case:
    """A case with the values of the common legend, annotated as far as its dataset is."""
    said = values if case.annotated is None else case.annotated
    kept = case.annotated is None and missing_is_unknown  # by what the case has
    annotated = tuple(sorted(values[value] for value in said))
    masks = tuple(_mask_in_legend(mask, values) for mask in case.masks)
    return replace(case, masks=masks, annotated=None if kept or not masks else annotated)


def _mask_in_legend(mask: Mask, values: Mapping[int, int]) -> Mask:
    if mask.value is not None:
        return replace(mask, value=values[mask.value])
    if mask.names:
        return replace(mask, names={name: values[value] for name, value in mask.names.items()})
    return replace(mask, legend=dict(values))


def _told_apart(case: Case, dataset: str, shared: set[str], settings: PrepareSettings) -> Case:
    case = replace(case, covariates={DATASET: dataset, **case.covariates})
    if case.name.lower() not in shared:
        return case
    says = case.subject is not None or settings.subject_pattern is not None or "sub-" in case.path
    return replace(case, name=f"{dataset}_{case.name}", subject=case.subject if says else case.name.lower())


def _with_all_columns(cases: Sequence[Case]) -> list[Case]:
    """Cases with the covariates of all; what another dataset alone says is unknown."""
    columns = dict.fromkeys(name for case in cases for name in case.covariates)
    return [replace(case, covariates={**dict.fromkeys(columns), **case.covariates}) for case in cases]


def _together(texts: Iterable[str | None]) -> str | None:
    """Different texts in a row; ``None`` where one is not known."""
    listed = list(dict.fromkeys(texts))
    return None if None in listed else " AND ".join(map(str, listed))


def _references(sources: Iterable[Source]) -> dict[str, str]:
    rows = [source.references for source in sources]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: "; ".join(dict.fromkeys(row[key] for row in rows if key in row)) for key in keys}
