"""Check a dataset and write the work folder that every later stage reads (A2, A6, B5, H13).

The folder holds ``images/CASE.nii.gz`` and ``labels/CASE.nii.gz`` in RAS+, ``datalist.json`` (Decathlon form, split by
patient), ``intensity.json`` and, written last, ``report.json``.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value, read_json, write_json
from fibldm.volumes.case_checks import CaseFacts, Finding, check_case
from fibldm.volumes.layouts import Case, find_source
from fibldm.volumes.prepare_settings import Plan, PrepareSettings, make_plan
from fibldm.volumes.work_folder import (
    PERCENTILES,
    STAGING,
    WRITTEN,
    Checked,
    file_stat,
    label_values,
    report_dict,
    staging,
    tracked,
    write_work,
)

MAX_LABELS = 200
"""More labels than this are taken for an image given as a label volume."""


@dataclass(frozen=True)
class Report:
    """What a preparation did.

    Attributes:
        work: the work folder.
        counts: number of cases by split.
        findings: warnings about cases.
        notes: what has to be said about the dataset as a whole.
        unchanged: whether the folder was there already, from the same source and settings.
    """

    work: Path
    counts: Mapping[str, int]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    unchanged: bool = False


def prepare(
    source: Path, work: Path, settings: PrepareSettings | None = None, *, restart: bool = False, progress: bool = True
) -> Report:
    """Check every case of ``source`` and write the work folder ``work``, or find that it is there already.

    Args:
        source: folder of a dataset, or a CSV manifest; never changed.
        work: folder to write.
        settings: what the user decides; ``None`` means the defaults.
        restart: whether a work folder of another source or other settings is written anew.
        progress: whether to show progress bars on standard error, where that is a terminal.

    Raises:
        FibldmError: a setting does not fit, the layout or split cannot be made, a case has an error (all findings are
            listed, and recorded in ``report.json``), or ``work`` holds something else.
    """
    source, work, settings = Path(source), Path(work), settings or PrepareSettings()
    earlier = _earlier_report(source, work)
    plan = make_plan(find_source(source, settings.layout), settings)
    if earlier is not None and not restart:
        return _unchanged(work, earlier, plan)
    checked = _check_all(plan, progress)
    if not checked.sound:
        _fail(work, plan, checked, complete=earlier is not None)
    with staging(work) as folder:
        write_work(folder, plan, checked, progress=progress)
    return Report(work, plan.counts, checked.findings, checked.notes)


def _earlier_report(source: Path, work: Path) -> dict[str, Any] | None:
    """The report of a finished preparation in ``work``; ``None`` where nothing but a failed one may lie there."""
    folder, target = source.resolve(), work.resolve()
    if target == folder or target in folder.parents:
        raise FibldmError(f"--out must not be the source or a folder around it; got {work}", "choose another folder")
    if work.exists() and not work.is_dir():
        raise FibldmError(f"--out must be a folder; {work} is a file", "choose another folder")
    report = read_json(work / "report.json") if (work / "report.json").exists() else {"ok": False, "settings_hash": ""}
    ours = isinstance(report, dict) and "settings_hash" in report
    allowed = (*(WRITTEN if ours and report.get("ok") else WRITTEN[-1:] if ours else ()), STAGING)
    foreign = sorted(path.name for path in work.glob("*") if path.name not in allowed)
    if foreign:
        raise FibldmError(
            f"--out must be empty, absent or a finished work folder; {work} holds {', '.join(foreign)}",
            "choose another folder, or empty this one",
        )
    return report if report["ok"] else None


def _unchanged(work: Path, earlier: Mapping[str, Any], plan: Plan) -> Report:
    decisions = plan.decisions()
    same = earlier["settings_hash"] == hash_value(decisions)
    changed = [] if same else _differences(earlier, decisions)
    if same:
        changed = [f"files of {case.name}" for case in plan.source.cases if not _same_files(case, earlier["cases"])]
    if changed:
        raise FibldmError(
            f"{work} was prepared otherwise, and a split is never changed silently; different: {'; '.join(changed)}",
            "choose another --out, or write it anew with --restart",
        )
    files = [f"{kind}/{case.name}.nii.gz" for kind in WRITTEN[:2] for case in plan.source.cases]
    lost = [name for name in (*files, *WRITTEN[2:]) if not (work / name).is_file()]
    if lost:
        raise FibldmError(f"{work} must be complete; it lacks {', '.join(lost)}", "write it anew with --restart")
    findings = tuple(Finding(**finding) for finding in earlier["findings"])
    return Report(work, plan.counts, findings, tuple(earlier["notes"]), unchanged=True)


def _differences(earlier: Mapping[str, Any], decisions: Mapping[str, Any]) -> list[str]:
    before, now = earlier["settings"], decisions["settings"]
    listed = [
        f"--{key.replace('_', '-')} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if earlier["dataset"] != decisions["dataset"]:
        listed.append("what dataset.json says")
    patients, cases = earlier["patients"], decisions["cases"]
    names = sorted(name for name in patients.keys() | cases.keys() if patients.get(name) != cases.get(name))
    return listed + ([f"cases {', '.join(names)}"] if names else [])


def _same_files(case: Case, earlier: Mapping[str, Any]) -> bool:
    return all(
        file_stat(path) == {key: earlier[case.name][kind][key] for key in ("bytes", "mtime_ns")}
        or hash_file(path) == earlier[case.name][kind]["sha256"]
        for kind, path in (("image", case.image), ("label", case.label))
    )


def _check_all(plan: Plan, progress: bool) -> Checked:
    findings: list[Finding] = []
    facts: dict[str, CaseFacts] = {}
    for case in tracked(plan.source.cases, "Checking", progress):
        found, about = check_case(case, plan.modality, PERCENTILES)
        findings += found
        if about is not None:
            facts[case.name] = about
    findings += _copies(facts) + _label_findings(facts)
    return Checked(facts, tuple(findings), (*plan.notes, *_label_notes(plan, facts)))


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
    if facts and not values:
        return [Finding("all cases", "error", "at least one label must occur; every label volume is background")]
    if len(values) > MAX_LABELS:
        message = f"there must be at most {MAX_LABELS} labels; {len(values)} occur (an image given as a label?)"
        return [Finding("all cases", "error", message)]
    return []


def _label_notes(plan: Plan, facts: Mapping[str, CaseFacts]) -> list[str]:
    values, names = label_values(facts), plan.label_names
    trained = label_values({name: about for name, about in facts.items() if plan.splits[name] == "training"})
    lists = {
        "labels that are named but occur in no case": [f"{key} ({names[key]})" for key in names if key not in values],
        "labels without a name": [str(value) for value in values if names and value not in names],
        "labels that occur in no training case": [str(value) for value in values if value not in trained],
    }
    return [f"{what}: {', '.join(found)}" for what, found in lists.items() if found]


def _fail(work: Path, plan: Plan, checked: Checked, *, complete: bool) -> None:
    """Raise all findings, after recording them where this overwrites no finished folder."""
    if not complete:
        write_json(work / "report.json", report_dict(plan, checked))
    errors = sum(finding.level == "error" for finding in checked.findings)
    listed = "".join(f"\n  {finding.case}: {finding.level}: {finding.message}" for finding in checked.findings)
    raise FibldmError(
        f"every case must be sound; {errors} errors and {len(checked.findings) - errors} warnings in "
        f"{len(plan.source.cases)} cases, nothing was prepared:{listed}",
        "correct or leave out these cases, and run fibldm prepare again",
    )
