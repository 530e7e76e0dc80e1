"""Check a dataset and write the work folder that every later stage reads.

The folder holds ``images/CASE.nii.gz`` and ``labels/CASE.nii.gz`` in RAS+, ``datalist.json`` (Decathlon form, split by
patient), ``intensity.json`` and, written last, ``report.json``. Every case is read, checked and written by itself, in
parallel, and a case that is done is not done again when a run was interrupted or failed for another case.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fibldm import __version__
from fibldm.datasets.annotated import hide_background, notes_on_annotated, partly_annotated
from fibldm.datasets.case import CaseFacts, Record, prepare_case
from fibldm.datasets.facts import notes_on_facts
from fibldm.datasets.findings import Finding, Findings, table
from fibldm.datasets.layouts import find_source
from fibldm.datasets.plan import Plan, make_plan
from fibldm.datasets.pseudonyms import SALT_FILE, Pseudonyms, key_of, key_path, pending_path, read_pseudonyms
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.several import joined_sources
from fibldm.datasets.source import Case, Source
from fibldm.datasets.split import ADD_PATIENTS, patients_to_split, too_few
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
from fibldm.progress import track
from fibldm.typed_settings import counted
from fibldm.volumes.second_image import FOLDER as SECOND_IMAGES
from fibldm.workers import Engine, Work, engine_of

MAX_LABELS = 200
"""More labels than this are taken for an image given as a label volume."""

ALL_CASES = "all cases"
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
    source: Path | Sequence[Path],
    work: Path,
    settings: PrepareSettings | None = None,
    *,
    restart: bool = False,
    workers: int | None = None,
    cluster: str | None = None,
    keep_salt: bool = False,
    progress: bool = True,
) -> Report:
    """Check every case of ``source`` and write the work folder ``work``, or find that it is there already.

    Args:
        source: folder of a dataset, or a table of its cases; never changed. Several become one, see `joined_sources`.
        work: folder to write.
        settings: what the user decides; ``None`` means the defaults.
        restart: whether a work folder of another source or other settings is written anew.
        workers: processes that read at the same time, each of them one case; None is this one alone. More than one
            needs a main module that can be imported (``if __name__ == "__main__"``).
        cluster: address of a scheduler of Dask, whose workers read instead; they must see source and work folder.
        keep_salt: whether the salt of the patients' names is written into ``work`` as well.
        progress: whether to show a progress bar on standard error, where that is a terminal.

    Raises:
        FibldmError: a setting does not fit, the layout or split cannot be made, a case has an error (all findings are
            listed, and recorded in ``report.json``), ``work`` holds something else, or another process writes it.
    """
    sources = [Path(path) for path in ([source] if isinstance(source, str | Path) else source)]
    work, settings = Path(work), settings or PrepareSettings()
    engine = engine_of(workers, cluster)
    for path in sources:
        _refuse_overlap(path, work)
    if len(sources) == 1:
        found = find_source(sources[0], settings)
    else:
        found, settings = joined_sources(sources, settings)
    with alone(beside(work), str(work), "wait until that has ended, or choose another folder"):
        earlier = _earlier_report(work)
        pseudonyms = _pseudonyms(work, needed=earlier is not None and not restart)
        findings = Findings(notes=list(found.notes))
        plan = make_plan(found, settings, pseudonyms, findings)
        if earlier is not None and not restart:
            return _unchanged(work, earlier, plan.split(earlier["left_out"]))
        with key_of(work, pseudonyms, plan.source.cases), replaced(work) as folder:
            checked = _with_split(_check_all(plan, findings, folder, engine, progress))
            _refuse_bad(work, found, checked, complete=earlier is not None)
            _hide_background(folder, checked, engine, progress)
            write_lists(folder, checked)
        if keep_salt:
            write_text(work / SALT_FILE, f"{pseudonyms.salt}\n")
        return Report(work, checked.plan.counts, tuple(findings.listed), tuple(findings.notes), tuple(findings.bad))


def _refuse_overlap(source: Path, work: Path) -> None:
    folder, target = source.resolve(), work.resolve()
    if target == folder or target in folder.parents or folder in target.parents[1:]:
        message = f"the work folder must not be the source, a folder around it, or one among its data; got {work}"
        raise FibldmError(message, "choose another folder")
    if work.exists() and not work.is_dir():
        raise FibldmError(f"the work folder must be a folder; {work} is a file", "choose another folder")


def _earlier_report(work: Path) -> dict[str, Any] | None:
    """The report of a finished preparation in ``work``; ``None`` where nothing but a failed one may lie there."""
    report = read_json(work / "report.json") if (work / "report.json").exists() else {"ok": False, "settings_hash": ""}
    ours = isinstance(report, dict) and "settings_hash" in report
    complete = ours and (bool(report.get("ok")) or half_moved(work))
    foreign = foreign_files(work, ours=ours, complete=complete)
    if foreign:
        raise FibldmError(
            f"the work folder must be empty, absent or a finished work folder; {work} holds {', '.join(foreign)}",
            "choose another folder, or empty this one",
        )
    return report if report["ok"] else None


def _pseudonyms(work: Path, *, needed: bool) -> Pseudonyms:
    there = read_pseudonyms(work)
    if there is None and needed:
        raise FibldmError(
            f"{work} is known by its key {key_path(work)}, which is gone", "put it back, or write anew with `restart`"
        )
    return there or Pseudonyms()


def _unchanged(work: Path, earlier: Mapping[str, Any], plan: Plan) -> Report:
    decisions = plan.decisions()
    same = earlier["settings_hash"] == hash_value(decisions)
    changed = [] if same else _differences(earlier, decisions)
    if same:
        about = plan.case_settings
        changed = [f"files of {case.name}" for case in plan.source.cases if not _same_files(case, about, earlier)]
    if changed:
        raise FibldmError(
            f"{work} was prepared otherwise, and a split is never changed silently; different: {'; '.join(changed)}",
            "choose another folder, or write it anew with `restart`",
        )
    lost = [name for name in (*_volumes(earlier), *WRITTEN[2:]) if not (work / name).is_file()]
    if lost:
        raise FibldmError(
            f"{work} must be complete; it lacks {', '.join(sorted(lost))}", "write it anew with `restart`"
        )
    findings = tuple(Finding(**finding) for finding in earlier["findings"])
    left_out = tuple(earlier["left_out"])
    return Report(work, plan.counts, findings, tuple(earlier["notes"]), left_out, unchanged=True)


def _volumes(earlier: Mapping[str, Any]) -> Iterator[str]:
    for name in earlier["cases"].keys() - set(earlier["left_out"]):
        yield f"images/{name}.nii.gz"
        if earlier["cases"][name]["label_volume_ml"] is not None:
            yield f"labels/{name}.nii.gz"
        if "second_sha256" in earlier["cases"][name]:
            yield f"{SECOND_IMAGES}/{name}.nii.gz"


def _differences(earlier: Mapping[str, Any], decisions: Mapping[str, Any]) -> list[str]:
    before, now = earlier["settings"], decisions["settings"]
    listed = [f"`{key}` {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if earlier["dataset"] != decisions["dataset"]:
        listed.append("what the dataset says of itself")
    patients, cases = earlier["patients"], decisions["cases"]
    names = sorted(name for name in patients.keys() | cases.keys() if patients.get(name) != cases.get(name))
    return listed + ([f"cases {', '.join(names)}"] if names else [])


def _same_files(case: Case, settings: PrepareSettings, earlier: Mapping[str, Any]) -> bool:
    """Whether a case that was sound is what it was; one that was left out has to be looked at anew if it changed."""
    about = earlier["cases"].get(case.name)
    if about is None:
        return prepare_case(case, settings, None).facts is None
    if file_stat(case) == about["files"]:
        return True
    facts = prepare_case(case, settings, None).facts
    return facts is not None and facts.voxels == about["voxels"]


def _check_all(plan: Plan, findings: Findings, folder: Path, engine: Engine, progress: bool) -> Checked:
    """Read, check and write every case that an earlier, interrupted run has not done."""
    cases, settings = plan.source.cases, plan.case_settings
    stats = {case.name: file_stat(case) for case in cases}
    keys = {case.name: _record_key(case, settings, stats[case.name]) for case in cases}
    done = {name: record for name in keys if (record := _stored_record(folder, name, keys[name])) is not None}
    waiting = [case for case in cases if case.name not in done]
    bar = partial(track, what="prepare", shown=progress)
    items = [(case, settings, folder, keys[case.name]) for case in waiting]
    records = engine.each(Work(_recorded, what="read a case", folder=folder), items, bar)
    done |= {case.name: record for case, record in zip(waiting, records, strict=True)}
    facts = {case.name: about for case in cases if (about := done[case.name].facts) is not None}
    findings.listed += [finding for case in cases for finding in done[case.name].findings]
    findings.listed += [*_copies(facts), *_label_findings(facts)]
    known = {case.name: {**facts[case.name].acquisition, **case.covariates} for case in cases if case.name in facts}
    findings.notes += notes_on_facts(plan.settings.facts, known)
    return Checked(plan, facts, stats, findings)


def _recorded(case: Case, settings: PrepareSettings, folder: Path, key: str) -> Record:
    """The record of a case, which is kept as soon as the case is done."""
    if (there := _stored_record(folder, case.name, key)) is not None:
        return there
    record = prepare_case(case, settings, folder)
    write_json(folder / RECORDS / f"{case.name}.json", {"key": key, "record": asdict(record)})
    return record


def _record_key(case: Case, settings: PrepareSettings, stat: str) -> str:
    said = [case.item, *([] if case.annotated is None else [case.annotated])]
    return hash_value([__version__, asdict(settings), [asdict(mask) for mask in case.masks], *said, stat])


def _stored_record(folder: Path, name: str, key: str) -> Record | None:
    path = folder / RECORDS / f"{name}.json"
    stored = read_json(path) if path.is_file() else {}
    record = Record.from_dict(stored["record"]) if stored.get("key") == key else None
    volumes = [] if record is None or record.facts is None else [f"images/{name}.nii.gz"]
    if record is not None and record.facts is not None and record.facts.second_voxels is not None:
        volumes.append(f"{SECOND_IMAGES}/{name}.nii.gz")
    return record if all((folder / volume).is_file() for volume in volumes) else None


def _copies(facts: Mapping[str, CaseFacts]) -> Iterator[Finding]:
    by_voxels = defaultdict(list)
    for name, about in facts.items():
        by_voxels[about.image_voxels].append(name)
    for first, *others in by_voxels.values():
        for name in others:
            yield Finding(name, "error", f"image must be there once; it has the same voxels as {first}")


def _label_findings(facts: Mapping[str, CaseFacts]) -> Iterator[Finding]:
    count = len(label_values(facts))
    if not count and any(about.label_ml is not None for about in facts.values()):
        yield Finding(ALL_CASES, "error", "at least one label must occur; every label volume is background")
    if count > MAX_LABELS:
        message = f"there must be at most {MAX_LABELS} labels; {count} occur (an image given as a label?)"
        yield Finding(ALL_CASES, "error", message)


def _with_split(checked: Checked) -> Checked:
    """The same with the split of the cases that are not left out, and notes on their labels."""
    findings, facts = checked.findings, checked.facts
    plan = checked.plan.split(findings.bad if _leaves_out(checked) else ())
    values, names = label_values(facts), plan.label_names
    trained = label_values({name: about for name, about in facts.items() if plan.splits.get(name) == "training"})
    for what, listed in {
        "labels that are named but occur in no case": [f"{key} ({names[key]})" for key in names if key not in values],
        "labels that occur in no training case": [str(value) for value in values if value not in trained],
    }.items():
        if listed:
            findings.notes.append(f"{what}: {', '.join(listed)}")
    unmasked = sum(about.label_ml is None for about in facts.values())
    if unmasked:
        findings.notes.append(f"cases without a mask, for the autoencoder only: {unmasked}")
    kept = {name: about for name, about in facts.items() if name in plan.splits}
    labels, missing_is_unknown = label_values(kept), plan.settings.missing_is_unknown
    partly = partly_annotated(plan.source.cases, kept, labels, missing_is_unknown=missing_is_unknown)
    masked = sum(about.label_ml is not None for about in kept.values())
    findings.notes += notes_on_annotated(partly, labels, names, masked)
    return replace(checked, plan=plan, partial=partly)


def _hide_background(folder: Path, checked: Checked, engine: Engine, progress: bool) -> None:
    """Make the background of partly annotated cases unknown in their written masks.

    What is recorded of a case tells of its mask as read, so the record goes first: a run that follows an interrupted
    one reads the case anew.
    """
    names = sorted(checked.partial)
    for name in names:
        (folder / RECORDS / f"{name}.json").unlink(missing_ok=True)
    items = [(folder / f"labels/{name}.nii.gz",) for name in names]
    bar = partial(track, what="partial masks", shown=progress)
    list(engine.each(Work(hide_background, what="wrote a mask", folder=folder), items, bar))


def _leaves_out(checked: Checked) -> bool:
    return checked.plan.settings.skip_bad and ALL_CASES not in checked.findings.bad


def _refuse_bad(work: Path, found: Source, checked: Checked, *, complete: bool) -> None:
    """Raise all findings where bad cases are not to be left out, or too few patients are left without them."""
    plan, bad, listed = checked.plan, checked.findings.bad, checked.findings.listed
    sound = _leaves_out(checked) or not bad
    if plan.splits and sound:
        return
    if not complete:
        write_json(work / "report.json", report_dict(checked, ok=False))
    lines = "".join(f"\n  {line}" for line in table(listed))
    if sound:
        patients = patients_to_split([case for case in plan.source.cases if case.name not in bad])
        lines += "".join(f"\n  note: {note}" for note in found.notes)  # what was left out may be the patients lacking
        raise FibldmError(f"{too_few(len(patients))}{':' if lines else ''}{lines}", ADD_PATIENTS)
    errors = sum(finding.level == "error" for finding in listed)
    raise FibldmError(
        f"every case must be sound; {counted(errors, 'error')} and {counted(len(listed) - errors, 'warning')} in "
        f"{counted(len(plan.source.cases), 'case')}, nothing was prepared:{lines}",
        f"correct these cases, or leave them out with `skip_bad` ({pending_path(work).name} says where each lies)",
    )
