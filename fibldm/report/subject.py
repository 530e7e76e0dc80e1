"""What a report is of: a run, a bundle, or what was measured of one; read from where it lies, and nothing made up.

Whatever is missing is said in the report. What is wrong is an error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from fibldm.delivery.export import WORDS, Exported
from fibldm.delivery.model_card import CardText
from fibldm.errors import FibldmError, some_of
from fibldm.files import hash_file, read_json
from fibldm.manifest import MANIFEST
from fibldm.report.curves import Losses
from fibldm.runs import StageFolder, hash_weights, load_facts
from fibldm.runs.stages import begun
from fibldm.synthesis.bundle import GENERATOR, open_bundle
from fibldm.synthesis.loading import generating_weights
from fibldm.volumes.datalist import read_datalist

_METRICS, _AUDIT = "metrics.json", "audit.json"
_SHOWN = 5

Kind = Literal["run", "bundle", "evaluation"]


@dataclass(frozen=True)
class Work:
    """A work folder that a report may look into.

    Attributes:
        folder: of ``fibldm prepare``.
        report: content of its ``report.json``.
        datalist: that of its ``datalist.json``.
    """

    folder: Path
    report: Mapping[str, Any]
    datalist: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, data: str | None) -> "Work":
        """A work folder.

        Args:
            folder: of ``fibldm prepare``.
            data: fingerprint of the data that the generator was trained on; None where that is not known.

        Raises:
            FibldmError: it is none, or holds other data.
        """
        datalist = read_datalist(folder)
        if data is not None and datalist["content"] != data:
            raise FibldmError(
                f"a report shows the data that the generator was trained on ({data[:12]}); {folder} holds "
                f"{datalist['content'][:12]}",
                "give the work folder that it was trained with",
            )
        return cls(folder, read_json(folder / "report.json"), datalist)


@dataclass(frozen=True)
class Subject:
    """What a report is of.

    Attributes:
        kind: what lies there.
        name: of the folder, or of the bundle.
        facts: content of ``latents.json`` or ``generator.json``; empty where there is none.
        figures: content of ``metrics.json``; empty where nothing was measured.
        pictures: folder of the pictures that the figures name.
        plain_figures: values without intervals, by name, as bundles have them.
        audit: content of ``audit.json``; None where there is none.
        audit_folder: where it lies.
        losses: of the stages that are trained.
        stages: of each, what its ``done.json`` says; empty where it is not done.
        seconds: that each took.
        hashes: SHA-256 by what it is of.
        weights: fingerprints of the network that draws, of which volumes may be.
        words: what a person says of it.
        licence: of the weights; None where that is not decided.
        work: the work folder; None where there is none.
        work_missing: why there is none.
    """

    kind: Kind
    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    pictures: Path | None = None
    plain_figures: Mapping[str, float] = field(default_factory=dict)
    audit: Mapping[str, Any] | None = None
    audit_folder: Path | None = None
    losses: Sequence[Losses] = ()
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    weights: frozenset[str] = frozenset()
    words: CardText = field(default_factory=CardText)
    licence: str | None = None
    work: Work | None = None
    work_missing: str = "no work folder was given (--data)"

    @property
    def labels(self) -> dict[int, str]:
        """Names by value, background left out; empty where nobody says them."""
        known = self.facts.get("labels") or (self.work.datalist["labels"] if self.work else {})
        return {int(value): str(name) for value, name in known.items() if int(value)}

    @property
    def sections(self) -> dict[str, Mapping[str, Any]]:
        """What was measured, by name."""
        return sections_of(self.figures)


def sections_of(content: Any) -> dict[str, Mapping[str, Any]]:
    """The measurements in the content of a ``metrics.json``."""
    if not isinstance(content, Mapping):
        return {}
    return {name: part for name, part in content.items() if isinstance(part, Mapping) and "figures" in part}


def open_subject(
    source: Path,
    *,
    data: Path | None = None,
    evaluation: Path | None = None,
    audit: Path | None = None,
    trust: bool = False,
) -> Subject:
    """What lies in a folder, or in the zip archive of a bundle.

    Args:
        source: a run, a bundle, or a folder of ``fibldm evaluate`` or ``fibldm audit``.
        data: the work folder; None takes that which a run names, where it is still there.
        evaluation: folder of ``fibldm evaluate --bundle``, for a bundle.
        audit: folder of ``fibldm audit``; None looks into the source.
        trust: take a bundle that changed since its export.

    Raises:
        FibldmError: it is none of these, a bundle is refused, or the work folder is of other data.
    """
    subject = _of_source(Path(source), trust)
    if evaluation is not None:
        subject = replace(subject, **_measured(_evaluation(evaluation)))
    measured = subject.pictures and subject.pictures / "audit"
    folder = audit or _found(_AUDIT, source, source / "audit", measured, subject.pictures)
    if folder is not None:
        subject = replace(subject, audit=_read_audit(folder / _AUDIT), audit_folder=folder)
    data_of = subject.facts.get("data")
    if data is not None:
        return replace(subject, work=Work.open(data, data_of))
    return replace(subject, **_own_work(Path(source), data_of)) if subject.kind == "run" else subject


def as_exported(subject: Subject, made: Exported) -> Subject:
    """A run as the bundle that is made of it: nothing of single cases, and the figures of the weights that it ships."""
    return replace(
        subject,
        kind="bundle",
        name=str(made.facts["name"]),
        facts=made.facts,
        figures=made.measured.figures,
        hashes={**_files(made.facts), "data": str(made.facts["data"])},
        weights=frozenset(),  # figures of others are left out already
        audit=subject.audit if "audit" in made.measured.figures else None,
        words=made.words,
        licence=str(made.facts["licence"]),
        work=None,
        work_missing="a bundle carries nothing of single cases",
    )


def _of_source(source: Path, trust: bool) -> Subject:
    if not source.exists():
        raise FibldmError(f"{source} must exist; it does not", "check the path")
    if not source.is_dir() or (source / GENERATOR).exists():
        return _of_bundle(source, trust)
    if any((source / kind.name / "config.yaml").exists() for kind in begun(source)):
        return _of_run(source)
    if (folder := _evaluation_in(source)) or (source / _AUDIT).is_file():
        measured: dict[str, Any] = _measured(folder) if folder else {}
        return Subject("evaluation", source.resolve().name, **measured)
    inside = some_of(sorted(part.name for part in source.iterdir()), _SHOWN) or "nothing"
    raise FibldmError(
        f"a report is of a run (a folder with the stages of fibldm train), of a bundle (with {GENERATOR}), or of what "
        f"was measured (with evaluation/{_METRICS} of fibldm evaluate, or {_AUDIT} of fibldm audit); {source} holds "
        f"{inside}",
        "check the path",
    )


def _of_run(run: Path) -> Subject:
    done = {kind.name: StageFolder(run, kind.name).done() or {} for kind in begun(run)}
    losses = [
        Losses.read(kind.name, file)
        for kind in begun(run)
        if kind.is_trained and (file := run / kind.name / "metrics.csv").is_file()
    ]
    facts = load_facts(run) if done.get("latents") else {}
    hashes = {f"weights of {name}": str(said["weights"]) for name, said in done.items() if "weights" in said}
    if "data" in facts:
        hashes["data"] = str(facts["data"])
    folder = _evaluation_in(run)
    return Subject(
        "run",
        run.resolve().name,
        facts,
        **(_measured(folder) if folder else {}),
        losses=losses,
        stages=done,
        seconds={name: StageFolder(run, name).seconds() for name in done},
        hashes=hashes,
        weights=frozenset(generating_weights(run)),
    )


def _of_bundle(path: Path, trust: bool) -> Subject:
    with open_bundle(path, trust=trust) as opened:
        facts = opened.facts
        manifest = opened.root / MANIFEST
        hashes = {MANIFEST: hash_file(manifest)} if manifest.is_file() else {}
        metadata = opened.root / "configs" / "metadata.json"
        said = read_json(metadata) if metadata.is_file() else {}
        return Subject(
            "bundle",
            str(facts["name"]),
            facts,
            plain_figures=said.get("eval_metrics", {}),
            hashes={**hashes, **_files(facts), "data": str(facts["data"])},
            weights=frozenset({hash_weights(opened.network("network").state_dict())}),
            words=_words(opened.root, said),
            licence=str(facts["licence"]),
        )


def _files(facts: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files of weights of a bundle."""
    named = [entry for entry in facts["weights"].values() if isinstance(entry, Mapping)]
    return {str(entry["file"]): str(entry["sha256"]) for entry in named}


def _words(root: Path, metadata: Mapping[str, Any]) -> CardText:
    """Of ``export.yaml``, or as far as the metadata have them."""
    words = CardText.read(root / WORDS)
    kept = {key: metadata[key] for key in ("description", "intended_use") if isinstance(metadata.get(key), str)}
    return words if (root / WORDS).exists() else replace(words, **kept)


def _measured(folder: Path) -> dict[str, Any]:
    return {"figures": read_json(folder / _METRICS), "pictures": folder}


def _evaluation(folder: Path) -> Path:
    found = _evaluation_in(folder)
    if found is None:
        raise FibldmError(
            f"{folder} must hold evaluation/{_METRICS}, which fibldm evaluate writes; it does not", "check the path"
        )
    return found


def _evaluation_in(folder: Path) -> Path | None:
    """Where what was measured lies: there, or in its folder ``evaluation``."""
    for place in (folder / "evaluation", folder):
        if (place / _METRICS).is_file() and sections_of(read_json(place / _METRICS)):
            return place
    return None


def _found(name: str, *folders: Path | None) -> Path | None:
    return next((folder for folder in folders if folder is not None and (folder / name).is_file()), None)


def _read_audit(file: Path) -> Mapping[str, Any]:
    content = read_json(file)
    if not isinstance(content, Mapping) or "verdict" not in content:
        raise FibldmError(f"{file} must hold a verdict, as fibldm audit writes it; it does not", "audit again")
    return content


def _own_work(run: Path, data: str | None) -> dict[str, Any]:
    """The work folder that a run names, or why there is none."""
    for kind in begun(run):
        file = run / kind.name / "config.yaml"
        named = yaml.safe_load(file.read_text(encoding="utf-8")).get("work") if file.is_file() else None
        if isinstance(named, str) and Path(named).is_dir():
            try:
                return {"work": Work.open(Path(named), data)}
            except FibldmError as error:
                return {"work_missing": error.message}
    return {"work_missing": "the work folder that the run was trained with is not here; give it by --data"}
