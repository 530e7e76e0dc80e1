"""How a generator came to be, as sections of a report: hashes, data check, training and its time, limits, licence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fibldm.delivery.model_card import OTHER, unmedical
from fibldm.report.parts import Part, Table
from fibldm.report.subject import Subject
from fibldm.typed_settings import counted

_LISTED = 50


def hashes_part(subject: Subject) -> Part:
    """SHA-256 of weights, data and manifest."""
    title = "What this report is of"
    lines = [f"A report of the {subject.kind} {subject.name}."]
    if subject.words.description:
        lines.append(subject.words.description)
    lines += _facts(subject)
    rows = [*subject.hashes.items()]
    measured = {
        f"weights of the volumes of {name}": str(weights)
        for name, part in subject.sections.items()
        if (weights := (part.get("drawn") or {}).get("weights")) and weights not in subject.hashes.values()
    }
    rows += measured.items()
    if not rows:
        return Part(title, [*lines, "Not known: hashes of the weights."])
    return Part(title, lines, [Table("SHA-256", ("of", "SHA-256"), rows)])


def data_part(subject: Subject, *, names: bool = True) -> Part:
    """What the check of the dataset found.

    Args:
        subject: whose data they are.
        names: whether names of cases may be told.
    """
    title = "Data check"
    if subject.work is None:
        return Part(title, [f"Not shown: {subject.work_missing}.", *_trained_on(subject)])
    report, content = subject.work.report, subject.work.datalist
    lines = [_first(content.get("description")), *_trained_on(subject)]
    splits = [
        (
            split,
            str(len(content[split])),
            str(len({entry["subject"] for entry in content[split]})),
            str(sum("label" in entry for entry in content[split])),
        )
        for split in ("training", "validation", "test")
    ]
    tables = [Table("Cases of each split, parted by patient", ("split", "cases", "patients", "with a mask"), splits)]
    cases = report.get("cases", {})
    if rows := _extent(cases):
        tables.append(Table("Voxels and their size", ("", "smallest", "middle", "largest"), rows))
    if sizes := _labels(cases, subject.labels):
        tables.append(Table("Labels, in millilitres", ("label", "cases", "smallest", "middle", "largest"), sizes))
    left_out = report.get("left_out", [])
    lines.append(f"Left out as unsound: {counted(len(left_out), 'case')}." if left_out else "No case was left out.")
    findings = report.get("findings", [])
    if findings and names:
        tables.append(_findings(findings))
        if len(findings) > _LISTED:
            lines.append(f"{len(findings) - _LISTED} more findings are in report.json of the work folder.")
    lines.append(f"{counted(len(findings), 'finding')}." if findings else "The check found nothing to complain of.")
    lines += [f"Note: {note}" for note in report.get("notes", [])] if names else []
    return Part(title, [line for line in lines if line], tables)


def training_part(subject: Subject) -> Part:
    """Curves and time."""
    title = "Training and time"
    lines = []
    rows = []
    by_stage = {losses.stage: losses for losses in subject.losses}
    for stage, done in subject.stages.items():
        losses = by_stage.get(stage)
        epochs = str(done.get("stopped_epoch") or (losses.epochs if losses else "") or "")
        seconds = subject.seconds.get(stage, 0.0)
        best = "" if done.get("validation_loss") is None else f"{done['validation_loss']:.4g}"
        at = "" if done.get("best_epoch") is None else str(done["best_epoch"])
        rows.append((stage, "yes" if done else "not finished", epochs, at, best, _minutes(seconds)))
    heads = ("stage", "finished", "epochs", "best epoch", "validation loss", "time")
    tables = [Table("Stages", heads, rows).without_empty()] if rows else []
    calls = sorted(
        {
            int(drawn["network_calls"])
            for part in subject.sections.values()
            if (drawn := part.get("drawn") or {}).get("network_calls")
        }
    )
    if calls:
        lines.append(
            f"Synthesis: {' or '.join(map(str, calls))} network calls a volume. Seconds a volume: not measured."
        )
    if not rows:
        lines.insert(
            0, f"Not shown: training curves and times are kept by a run, and this is no run but {_A[subject.kind]}."
        )
    return Part(title, lines, tables, [losses.picture() for losses in subject.losses if losses.training])


_A = {"run": "a run", "bundle": "a bundle", "evaluation": "an evaluation"}


def limits_part(subject: Subject) -> Part:
    """What it is for and not for, and under which licences."""
    words = unmedical(subject.words) if subject.facts.get("modality") == OTHER else subject.words
    lines = [words.intended_use, words.limits]
    lines.append(
        "A mask drawn on a real scan still carries the anatomy of its patient, and so does a volume made from it."
    )
    weights = subject.licence or "not decided (fibldm export --license)"
    data = subject.facts.get("data_licence", subject.facts.get("licence") if subject.kind == "run" else None)
    if data is None and subject.work is not None:
        data = subject.work.datalist.get("licence")
    lines.append(f"Licence of the weights: {weights}. Licence of the training data: {data or 'not said'}.")
    if words.attribution:
        lines.append(f"Training data: {words.attribution}")
    return Part("Limits and licence", lines)


def _facts(subject: Subject) -> list[str]:
    facts = subject.facts
    if not facts:
        return []
    grid = facts["grid"]
    size, spacing = (" x ".join(f"{value:g}" for value in grid[key]) for key in ("size", "spacing"))
    labels = ", ".join(f"{value} {name}" for value, name in subject.labels.items()) or "none"
    return [f"Modality {facts['modality']}; model grid {size} voxels of {spacing} mm; labels: {labels}."]


def _trained_on(subject: Subject) -> list[str]:
    """The extent of the training data, as the generator knows it."""
    envelope = subject.facts.get("envelope") or {}
    lines = []
    for key, what in (("spacing_mm", "spacing"), ("field_of_view_mm", "field of view")):
        if isinstance(known := envelope.get(key), Mapping) and "min" in known:
            low, high = (" x ".join(f"{value:g}" for value in known[end]) for end in ("min", "max"))
            lines.append(f"Training data: {what} from {low} to {high} mm.")
    return lines


def _extent(cases: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, what in (("shape", "voxels along right, front, head"), ("spacing_mm", "mm along right, front, head")):
        values = [case[key] for case in cases.values() if case.get(key)]
        if values:
            table = np.array(values, dtype=float)
            ends = (table.min(axis=0), np.median(table, axis=0), table.max(axis=0))
            smallest, median, largest = (" x ".join(f"{value:.4g}" for value in end) for end in ends)
            rows.append((what, smallest, median, largest))
    return rows


def _labels(cases: Mapping[str, Mapping[str, Any]], names: Mapping[int, str]) -> list[tuple[str, ...]]:
    found: dict[int, list[float]] = {}
    for case in cases.values():
        for value, millilitres in (case.get("label_volume_ml") or {}).items():
            found.setdefault(int(value), []).append(float(millilitres))
    return [
        (
            f"{value} {names.get(value, '')}".strip(),
            str(len(sizes)),
            *(f"{size:.4g}" for size in (min(sizes), float(np.median(sizes)), max(sizes))),
        )
        for value, sizes in sorted(found.items())
    ]


def _findings(findings: Sequence[Mapping[str, Any]]) -> Table:
    heads = tuple(dict.fromkeys(key for finding in findings for key in finding))
    rows = [[str(finding.get(key, "")) for key in heads] for finding in findings[:_LISTED]]
    return Table("Findings", heads, rows).without_empty()


def _minutes(seconds: float) -> str:
    if not seconds:
        return ""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _first(text: Any) -> str:
    return str(text) if text else ""
