"""What was measured, as sections of a report: figures with intervals, and the audit."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError
from fibldm.evaluation.measurements import MEASUREMENTS
from fibldm.evaluation.results import Section
from fibldm.evaluation.statistics import Estimate
from fibldm.report.parts import Part, Picture, Table
from fibldm.report.subject import Subject
from fibldm.synthesis import SamplingSettings
from fibldm.typed_settings import counted

HOW_TO_READ = (
    "Every figure has a 95 % interval over patients and stands beside the same figure of real scans, which is what to "
    "compare it with. Fewer than eight patients are too few to say."
)

_ASKS = {
    "faithfulness": "Do the volumes follow their masks? Real scans are the ceiling, shuffled masks the floor.",
    "realism": "Do they look like real scans? Beside real against real.",
    "reconstruction": "What does the autoencoder lose?",
    "copies": "The baseline of the audit: is a volume closer to a training scan than any real test scan is?",
    "utility": "Can a segmenter learn from them?",
    "gate": "How good is the check of intensities?",
    "audit": "Is a volume a copy of a training scan, even turned or retouched?",
    "ct": "Is it as dense as real CT?",
    "spread": "How much do volumes of one mask differ?",
}
_HEADS = ("figure", "value", "95 % interval", "real scans", "shuffled masks", "patients", "note")
_LISTED = 10
_DIGITS = 12
NAME_LEFT_OUT = "[name left out]"
LEFT_OUT = "Left out: pictures of real scans, which are patient data (--with-real)."


def measured_parts(subject: Subject, *, with_real: bool, names: bool = True) -> list[Part]:
    """A section for each measurement, and what was not measured in one line.

    Args:
        subject: what was measured.
        with_real: show the pictures, which hold real scans.
        names: whether names of cases may be told.
    """
    sections = dict(subject.sections)
    missing = [name for name in MEASUREMENTS if name not in sections]
    if subject.audit is not None:  # it has a part of its own
        sections.pop("audit", None)
    lines = [HOW_TO_READ] if sections else []
    if missing and not subject.plain_figures:
        lines.append(f"Not measured: {', '.join(missing)} (fibldm evaluate).")
    tables = []
    if subject.plain_figures and not sections:
        lines.append(
            "The bundle holds values only; their intervals are in its model card, and here if the folder of "
            "fibldm evaluate is given (--evaluation)."
        )
        rows = [(name, f"{value:.4g}") for name, value in subject.plain_figures.items()]
        tables.append(Table("Figures of the bundle", ("figure", "value"), rows))
    head = Part("Figures", lines, tables)
    return [head, *(_section(subject, name, part, with_real=with_real, names=names) for name, part in sections.items())]


def audit_part(subject: Subject, *, with_real: bool, names: bool = True) -> Part:
    """Are volumes copies of training scans? As `fibldm audit` found it."""
    audit = subject.audit
    if audit is None:
        return Part("Audit for copies of training scans", ["Not measured: no audit.json was found (fibldm audit)."])
    if "threshold" not in audit:
        return Part("Audit for copies of training scans", [f"{_first_upper(audit['verdict'])}."])
    facts = audit.get("facts", {})
    lines = [
        f"Verdict: {audit['verdict']}.",
        f"{facts.get('synthetic_volumes', '?')} synthetic volumes against {facts.get('training_scans', '?')} training "
        f"scans, beside {facts.get('held_out_scans', '?')} scans of patients that were held out.",
    ]
    if "audit" not in subject.sections:
        lines.append("This audit does not record which weights drew the volumes; fibldm evaluate audit does.")
    if isinstance(audit.get("membership"), str):
        lines.append(f"{_first_upper(audit['membership'])}.")
    if isinstance(audit.get("own_masks"), str):
        lines.append(f"Volumes of training masks against those of held-out masks: {audit['own_masks']}.")
    copies = audit.get("copies", [])
    warnings = [f"{counted(len(copies), 'volume')} named as copies of training scans."] if copies else []
    tables = [Table("Audit", ("figure", "value", "95 % interval", "of"), _audit_rows(audit)).without_empty()]
    if figures := audit.get("figures"):
        tables.append(_table("Neighbours in two feature spaces", figures))
    pairs = audit.get("closest", []) if names else []
    if copies and names:
        tables.append(_pairs("Volumes named as copies", copies))
    if pairs:
        tables.append(_pairs(f"The {min(_LISTED, len(pairs))} volumes most similar to a training scan", pairs))
    if not names:
        lines.append("Names of volumes and scans are left out.")
    pictures, more = _pictures(subject.audit_folder, "closest.png", "Closest pairs of the audit", with_real)
    return Part("Audit for copies of training scans", [*lines, *more], tables, pictures, warnings=warnings)


def _section(subject: Subject, name: str, part: Mapping[str, Any], *, with_real: bool, names: bool) -> Part:
    lines = [_ASKS[name]] if name in _ASKS else []
    drawn = part.get("drawn") or {}
    if drawn:
        lines.append(_drawn(drawn))
    notes = [str(note) for note in part.get("notes", [])]
    warnings = notes if names else [_without_names(note, part) for note in notes]
    weights = drawn.get("weights")
    if weights and subject.weights and weights not in subject.weights:
        warnings.append(f"These figures are of other weights ({weights[:_DIGITS]}) than those of this report.")
    pictures, more = _pictures(
        subject.pictures, part.get("picture"), f"{name}: the volumes that matter most", with_real
    )
    return Part(
        _first_upper(name),
        [*lines, *more],
        [_table(_first_upper(name), part["figures"], part.get("units", {}))],
        pictures,
        of_another=True,
        warnings=warnings,
    )


def _without_names(note: str, part: Mapping[str, Any]) -> str:
    """A note without the names of volumes, masks, patients and scans that its measurement knows."""
    known = {
        str(case[key]) for case in part.get("cases", []) for key in ("case", "nearest", "subject") if case.get(key)
    }
    known |= {stem for name in known if (stem := name.rpartition("_")[0])}
    for name in sorted(known, key=len, reverse=True):
        note = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", NAME_LEFT_OUT, note)
    return note


def _drawn(drawn: Mapping[str, Any]) -> str:
    said = [counted(int(drawn.get("volumes", 0)), "volume")]
    if drawn.get("sampling") is not None:
        try:
            said.append(f"drawn by {SamplingSettings.from_dict(drawn['sampling']).described}")
        except FibldmError:
            said.append("drawn as another version of FibLDM says it")
    if drawn.get("network_calls"):
        said.append(f"{counted(drawn['network_calls'], 'network call')} each")
    return f"{', '.join(said)}."


def _table(caption: str, figures: Mapping[str, Mapping[str, Any]], units: Mapping[str, str] = {}) -> Table:
    rows = Section({name: _estimate(figure) for name, figure in figures.items()}).rows()
    named = [(_with_unit(row[0], units), *row[1:]) for row in rows]
    return Table(caption, _HEADS, named).without_empty()


def _with_unit(name: str, units: Mapping[str, str]) -> str:
    unit = units.get(name, units.get(name.partition("/")[0], ""))
    return f"{name}, {unit}" if unit else name


def _estimate(figure: Mapping[str, Any]) -> Estimate:
    value, low, high, real = (figure.get(name) for name in ("value", "low", "high", "real_vs_real"))
    return Estimate(value, low, high, int(figure.get("n", 0)), real, str(figure.get("note", "")))


def _audit_rows(audit: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = [("threshold of similarity", f"{audit['threshold']:.4g}", "", "")]
    for name, key in (("copy rate", "copy_rate"), ("held-out scans named by the same threshold", "held_out_named")):
        share = audit.get(key)
        if share and share.get("value") is not None:
            rows.append((name, f"{share['value']:.4g}", _between(share), f"{share['count']} of {share['of']}"))
    memorised = audit.get("memorised_patients")
    if memorised is not None:
        rows.append(("memorised patients", str(len(memorised)), "", ""))
    for name, key in (("membership AUC of the weights", "membership"), ("own masks AUC", "own_masks")):
        told = audit.get(key)
        if isinstance(told, Mapping):
            of = f"{told['training']} training, {told['held_out']} held out"
            rows.append((f"{name}, 0.5 is chance", f"{told['auc']:.4g}", _between(told), of))
    return rows


def _between(figure: Mapping[str, Any]) -> str:
    return f"[{figure['low']:.4g}, {figure['high']:.4g}]" if figure.get("low") is not None else ""


def _pairs(caption: str, pairs: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (str(pair["synthetic"]), str(pair["train"]), f"{pair['score']:.3f}", str(pair["transform"]))
        for pair in pairs[:_LISTED]
    ]
    return Table(caption, ("volume", "training scan", "similarity", "transform"), rows)


def _pictures(folder: Path | None, name: Any, alt: str, with_real: bool) -> tuple[list[Picture], list[str]]:
    """A picture that another command wrote, which holds real scans."""
    if folder is None or not isinstance(name, str) or not (folder / Path(name).name).is_file():
        return [], []
    return ([Picture(alt, alt, (folder / Path(name).name).read_bytes())], []) if with_real else ([], [LEFT_OUT])


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
