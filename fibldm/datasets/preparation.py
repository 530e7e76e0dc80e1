"""Check a dataset and write the work folder that every later stage reads.

The folder holds ``images/CASE.nii.gz`` and ``labels/CASE.nii.gz`` in RAS+, ``datalist.json`` (Decathlon form, split by
patient), ``intensity.json`` and, written last, ``report.json``. Every case is read, checked and written by itself, in
parallel, and a case that is done is not done again when a run was interrupted or failed for another case.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fibldm import __version__
from fibldm.datasets.case import CaseFacts, Record, Rules, prepare_case
from fibldm.datasets.checks import Finding, table
from fibldm.datasets.layouts import find_source
from fibldm.datasets.pseudonyms import SALT_FILE, Pseudonyms, key_of, key_path, pending_path, read_pseudonyms
from fibldm.datasets.settings import Plan, PrepareSettings, make_plan
from fibldm.datasets.source import Case, Source
from fibldm.datasets.split import ADD_PATIENTS, too_few
from fibldm.datasets.work_folder import (
    WRITTEN,
    Checked,
    file_stat,
    foreign_files,
    half_moved,
    label_values,
    replaced,
    report_dict,
    write_lists,
)
from fibldm.errors import FibldmError
from fibldm.files import hash_value, read_json, write_json, write_text
from fibldm.locks import alone, beside
from fibldm.plain_values import counted
from fibldm.progress import track
from fibldm.workers import in_processes

MAX_LABELS = 200
"""More labels than this are taken for an image given as a label volume."""

RECORDS = "records"


@dataclass(frozen=True)
class Report:
    """What a preparation did.

    Attributes:
        work: the work folder.
        counts: number of cases by split.
        findings: warnings about cases, and errors of those left out.
        notes: what has to be said about the dataset as a whole.
        left_out: cases left out for their errors.
        unchanged: whether the folder was there already, from the same source and settings.
    """

    work: Path
    counts: Mapping[str, int]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    unchanged: bool = False


def prepare(
    source: Path,
    work: Path,
    settings: PrepareSettings | None = None,
    *,
    restart: bool = False,
    workers: int = 1,
    keep_salt: bool = False,
    progress: bool = True,
) -> Report:
    """Check every case of ``source`` and write the work folder ``work``, or find that it is there already.

    Args:
        source: folder of a dataset, or a table of its cases; never changed.
        work: folder to write.
        settings: what the user decides; ``None`` means the defaults.
        restart: whether a work folder of another source or other settings is written anew.
        workers: processes that read at the same time; each holds one case in memory. More than one needs a main module
            that can be imported (``if __name__ == "__main__"``).
        keep_salt: whether the salt of the patients' names is written into ``work`` as well.
        progress: whether to show a progress bar on standard error, where that is a terminal.

    Raises:
        FibldmError: a setting does not fit, the layout or split cannot be made, a case has an error (all findings are
            listed, and recorded in ``report.json``), ``work`` holds something else, or another process writes it.
    """
    source, work, settings = Path(source), Path(work), settings or PrepareSettings()
    if workers < 1:
        raise FibldmError(f"--workers must be at least 1; got {workers}")
    _refuse_overlap(source, work)
    found = find_source(source, settings.layout, options=settings.layout_options)
    with alone(beside(work), str(work), "wait until that has ended, or choose another --out"):
        return _prepare(work, found, settings, restart=restart, workers=workers, keep_salt=keep_salt, progress=progress)


def _prepare(
    work: Path,
    found: Source,
    settings: PrepareSettings,
    *,
    restart: bool,
    workers: int,
    keep_salt: bool,
    progress: bool,
) -> Report:
    earlier = _earlier_report(work)
    pseudonyms = _pseudonyms(work, needed=earlier is not None and not restart)
    plan = make_plan(found, settings, pseudonyms, earlier["left_out"] if earlier is not None and not restart else ())
    if earlier is not None and not restart:
        return _unchanged(work, earlier, plan)
    with key_of(work, pseudonyms, plan.source.cases), replaced(work) as folder:
        checked = _check_all(plan, folder, workers, progress)
        plan = _settle(work, found, plan, checked, pseudonyms, complete=earlier is not None)
        write_lists(folder, plan, checked)
    if keep_salt:
        write_text(work / SALT_FILE, f"{pseudonyms.salt}\n")
    left_out = tuple(checked.bad)
    return Report(work, plan.counts, checked.findings, checked.notes, left_out)


def _refuse_overlap(source: Path, work: Path) -> None:
    folder, target = source.resolve(), work.resolve()
    if target == folder or target in folder.parents or folder in target.parents[1:]:
        message = f"--out must not be the source, a folder around it, or one among its data; got {work}"
        raise FibldmError(message, "choose another folder")
    if work.exists() and not work.is_dir():
        raise FibldmError(f"--out must be a folder; {work} is a file", "choose another folder")


def _earlier_report(work: Path) -> dict[str, Any] | None:
    """The report of a finished preparation in ``work``; ``None`` where nothing but a failed one may lie there."""
    report = read_json(work / "report.json") if (work / "report.json").exists() else {"ok": False, "settings_hash": ""}
    ours = isinstance(report, dict) and "settings_hash" in report
    complete = ours and (bool(report.get("ok")) or half_moved(work))
    foreign = foreign_files(work, ours=ours, complete=complete)
    if foreign:
        raise FibldmError(
            f"--out must be empty, absent or a finished work folder; {work} holds {', '.join(foreign)}",
            "choose another folder, or empty this one",
        )
    return report if report["ok"] else None


def _pseudonyms(work: Path, *, needed: bool) -> Pseudonyms:
    there = read_pseudonyms(work)
    if there is None and needed:
        raise FibldmError(
            f"{work} is known by its key {key_path(work)}, which is gone", "put it back, or write anew with --restart"
        )
    return there or Pseudonyms()


def _unchanged(work: Path, earlier: Mapping[str, Any], plan: Plan) -> Report:
    decisions = plan.decisions()
    same = earlier["settings_hash"] == hash_value(decisions)
    changed = [] if same else _differences(earlier, decisions)
    if same:
        rules = plan.rules
        changed = [f"files of {case.name}" for case in plan.source.cases if not _same_files(case, rules, earlier)]
    if changed:
        raise FibldmError(
            f"{work} was prepared otherwise, and a split is never changed silently; different: {'; '.join(changed)}",
            "choose another --out, or write it anew with --restart",
        )
    lost = [name for name in (*_volumes(earlier), *WRITTEN[2:]) if not (work / name).is_file()]
    if lost:
        raise FibldmError(
            f"{work} must be complete; it lacks {', '.join(sorted(lost))}", "write it anew with --restart"
        )
    findings = tuple(Finding(**finding) for finding in earlier["findings"])
    left_out = tuple(earlier["left_out"])
    return Report(work, plan.counts, findings, tuple(earlier["notes"]), left_out, unchanged=True)


def _volumes(earlier: Mapping[str, Any]) -> Iterator[str]:
    for name in earlier["cases"].keys() - set(earlier["left_out"]):
        yield f"images/{name}.nii.gz"
        if earlier["cases"][name]["label_volume_ml"] is not None:
            yield f"labels/{name}.nii.gz"


def _differences(earlier: Mapping[str, Any], decisions: Mapping[str, Any]) -> list[str]:
    before, now = earlier["settings"], decisions["settings"]
    listed = [
        f"--{key.replace('_', '-')} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if earlier["dataset"] != decisions["dataset"]:
        listed.append("what the dataset says of itself")
    patients, cases = earlier["patients"], decisions["cases"]
    names = sorted(name for name in patients.keys() | cases.keys() if patients.get(name) != cases.get(name))
    return listed + ([f"cases {', '.join(names)}"] if names else [])


def _same_files(case: Case, rules: Rules, earlier: Mapping[str, Any]) -> bool:
    """Whether a case that was sound is what it was; one that was left out has to be looked at anew if it changed."""
    about = earlier["cases"].get(case.name)
    if about is None:
        return prepare_case(case, rules, None).facts is None
    if file_stat(case) == about["files"]:
        return True
    facts = prepare_case(case, rules, None).facts
    return facts is not None and [facts.image_voxels, facts.label_voxels] == about["voxels"]


def _check_all(plan: Plan, folder: Path, workers: int, progress: bool) -> Checked:
    """Read, check and write every case that an earlier, interrupted run has not done."""
    cases, rules = plan.source.cases, plan.rules
    stats = {case.name: file_stat(case) for case in cases}
    keys = {case.name: _record_key(case, rules, stats[case.name]) for case in cases}
    done = {name: record for name in keys if (record := _stored_record(folder, name, keys[name])) is not None}
    waiting = [case for case in cases if case.name not in done]
    for case, record in zip(waiting, _prepared(waiting, rules, folder, workers, progress), strict=True):
        write_json(folder / RECORDS / f"{case.name}.json", {"key": keys[case.name], "record": record.to_dict()})
        done[case.name] = record
    facts = {case.name: about for case in cases if (about := done[case.name].facts) is not None}
    findings = [finding for case in cases for finding in done[case.name].findings]
    findings += _copies(facts) + _label_findings(facts)
    return Checked(facts, stats, tuple(findings), (*plan.notes, *_label_notes(plan, facts)))


def _prepared(cases: Sequence[Case], rules: Rules, folder: Path, workers: int, progress: bool) -> Iterator[Record]:
    bar = partial(track, what="prepare", shown=progress)
    calls = [(case, rules, folder) for case in cases]
    return in_processes(prepare_case, calls, workers=workers, bar=bar, what="read a case")


def _record_key(case: Case, rules: Rules, stat: str) -> str:
    return hash_value([__version__, asdict(rules), [asdict(mask) for mask in case.masks], case.item, stat])


def _stored_record(folder: Path, name: str, key: str) -> Record | None:
    path = folder / RECORDS / f"{name}.json"
    stored = read_json(path) if path.is_file() else {}
    record = Record.from_dict(stored["record"]) if stored.get("key") == key else None
    volumes = [] if record is None or record.facts is None else [f"images/{name}.nii.gz"]
    return record if all((folder / volume).is_file() for volume in volumes) else None


def _copies(facts: Mapping[str, CaseFacts]) -> list[Finding]:
    by_voxels = defaultdict(list)
    for name, about in facts.items():
        by_voxels[about.image_voxels].append(name)
    return [
        Finding(name, "error", f"image must be there once; it has the same voxels as {names[0]}")
        for names in by_voxels.values()
        for name in names[1:]
    ]


def _label_findings(facts: Mapping[str, CaseFacts]) -> list[Finding]:
    values = label_values(facts)
    if not values and any(about.label_ml is not None for about in facts.values()):
        return [Finding("all cases", "error", "at least one label must occur; every label volume is background")]
    if len(values) > MAX_LABELS:
        message = f"there must be at most {MAX_LABELS} labels; {len(values)} occur (an image given as a label?)"
        return [Finding("all cases", "error", message)]
    return []


def _label_notes(plan: Plan, facts: Mapping[str, CaseFacts]) -> list[str]:
    values, names = label_values(facts), plan.label_names
    trained = label_values({name: about for name, about in facts.items() if plan.splits.get(name) == "training"})
    unmasked = [name for name, about in facts.items() if about.label_ml is None]
    lists = {
        "labels that are named but occur in no case": [f"{key} ({names[key]})" for key in names if key not in values],
        "labels that occur in no training case": [str(value) for value in values if value not in trained],
    }
    notes = [f"{what}: {', '.join(found)}" for what, found in lists.items() if found]
    return [*notes, f"cases without a mask, for the autoencoder only: {len(unmasked)}"] if unmasked else notes


def _settle(work: Path, found: Source, plan: Plan, checked: Checked, pseudonyms: Pseudonyms, *, complete: bool) -> Plan:
    """The plan for the cases that are sound; raises all findings where bad ones are not to be left out."""
    skipping = plan.settings.skip_bad and "all cases" not in checked.bad
    settled = make_plan(found, plan.settings, pseudonyms, checked.bad) if checked.bad and skipping else plan
    if settled.splits and (skipping or not checked.bad):
        return settled
    if not complete:
        write_json(work / "report.json", report_dict(plan, checked, ok=False))
    errors = sum(finding.level == "error" for finding in checked.findings)
    listed = "".join(f"\n  {line}" for line in table(checked.findings))
    if skipping or not checked.bad:
        left = {subject for name, subject in settled.subjects.items() if name not in checked.bad}
        listed += "".join(f"\n  note: {note}" for note in found.notes)  # what was left out may be the patients lacking
        raise FibldmError(f"{too_few(len(left))}{':' if listed else ''}{listed}", ADD_PATIENTS)
    raise FibldmError(
        f"every case must be sound; {counted(errors, 'error')} and "
        f"{counted(len(checked.findings) - errors, 'warning')} in {counted(len(plan.source.cases), 'case')}, "
        f"nothing was prepared:{listed}",
        f"correct these cases, or leave them out with --skip-bad ({pending_path(work).name} says where each lies)",
    )
