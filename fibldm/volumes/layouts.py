"""Find the image and label files of a dataset: Decathlon, plain folders, or a CSV manifest (A2, B5)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError, unknown_choice
from fibldm.files import read_json
from fibldm.volumes.manifest import Manifest, is_manifest, read_manifest

LAYOUTS = ("auto", "decathlon", "folders", "csv")
SUFFIXES = (".nii.gz", ".nii")
SIDECARS = (".json", ".txt", ".md", ".csv", ".tsv")
REFERENCE_KEYS = ("description", "reference", "attribution")

Covariate = str | float | None


@dataclass(frozen=True)
class Case:
    """One image with its label, as found.

    Attributes:
        name: unique name, also the stem of the written files.
        image: path of the image.
        label: path of the label volume.
        path: the image's path as the dataset gives it (POSIX), searched for the patient.
        subject: patient, or ``None`` where the dataset does not say.
        split: ``training``, ``validation`` or ``test``, or ``None`` where the dataset does not say.
        covariates: further columns of a manifest; ``None`` for a missing value.
    """

    name: str
    image: Path
    label: Path
    path: str
    subject: str | None = None
    split: str | None = None
    covariates: Mapping[str, Covariate] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A dataset as found: its cases, and what it says about itself.

    Attributes:
        layout: ``decathlon``, ``folders`` or ``csv``.
        name: name of the dataset.
        cases: the cases, sorted by name.
        modality: as ``dataset.json`` writes it, or ``None``.
        labels: label value to name, without background.
        licence: as ``dataset.json`` writes it, or ``None``.
        references: the description, reference and attribution that ``dataset.json`` gives.
        notes: what was left out, one sentence each.
    """

    layout: str
    name: str
    cases: tuple[Case, ...]
    modality: str | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    licence: str | None = None
    references: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_source(source: Path, layout: str = "auto") -> Source:
    """The cases of the dataset at ``source``, a folder or a CSV file.

    Raises:
        FibldmError: unknown layout; none or several layouts fit; files or entries are missing, unmatched, no NIfTI or
            not unique (all of them listed).
    """
    if layout not in LAYOUTS:
        raise unknown_choice("layout", layout, LAYOUTS)
    if not source.exists():
        raise FibldmError(f"the source {source} must exist", "check the path")
    chosen = detect_layout(source) if layout == "auto" else layout
    return {"decathlon": _decathlon, "folders": _folders, "csv": _csv}[chosen](source)


def detect_layout(source: Path) -> str:
    """The one layout that fits ``source``.

    Raises:
        FibldmError: none fits or several do.
    """
    fitting = {
        "decathlon": (source / "dataset.json").is_file() and "training" in _read_dataset_json(source),
        "folders": (source / "images").is_dir() and (source / "labels").is_dir(),
        "csv": source.is_file() or any(is_manifest(path) for path in source.glob("*.csv")),
    }
    found = [name for name, fits in fitting.items() if fits]
    if len(found) == 1:
        return found[0]
    raise FibldmError(
        f"{source} must follow one layout; {', '.join(found) if found else 'none'} fits. Looked for a dataset.json "
        "with a training list (decathlon), the folders images/ and labels/ (folders), and a CSV with the columns "
        "image and label (csv)",
        "choose with --layout decathlon|folders|csv" if found else "arrange the files in one of these ways",
    )


def stem(path: Path) -> str:
    """The file name without ``.nii`` or ``.nii.gz``."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def _decathlon(source: Path) -> Source:
    facts = _read_dataset_json(source)
    entries = facts.get("training")
    if not isinstance(entries, list) or not entries:
        raise FibldmError(
            f"{source / 'dataset.json'} must have a list 'training' of {{image, label}} entries; got {entries!r}"
        )
    problems = [
        f"training[{index}] must be an object with image and label; got {entry!r}"
        for index, entry in enumerate(entries)
        if not _is_pair(entry)
    ]
    pairs = [(Path(entry["image"]), Path(entry["label"])) for entry in entries if _is_pair(entry)]
    cases = [Case(stem(image), source / image, source / label, image.as_posix()) for image, label in pairs]
    _check_cases(cases, problems, source, "give every file of the training list its own name")
    return _describe("decathlon", source, cases, facts, _unlabelled_note(source, facts))


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("image", "label"))


def _unlabelled_note(source: Path, facts: Mapping[str, Any]) -> tuple[str, ...]:
    listed = facts.get("test")
    count = len(listed) if isinstance(listed, list) else len(list(source.glob("imagesTs/[!.]*")))
    return (f"images without a label (test list, imagesTs) are left out: {count}",) if count else ()


def _folders(source: Path) -> Source:
    problems: list[str] = []
    images, labels = (_files_by_stem(source / name, problems) for name in ("images", "labels"))
    problems += [f"images/{images[name].name} has no label" for name in sorted(images.keys() - labels.keys())]
    problems += [f"labels/{labels[name].name} has no image" for name in sorted(labels.keys() - images.keys())]
    names = sorted(images.keys() & labels.keys())
    cases = [Case(name, images[name], labels[name], f"images/{images[name].name}") for name in names]
    _check_cases(cases, problems, source, "an image and its label carry the same name in images/ and labels/")
    facts = _read_dataset_json(source) if (source / "dataset.json").is_file() else {}
    return _describe("folders", source, cases, facts)


def _files_by_stem(folder: Path, problems: list[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise FibldmError(f"{folder} must be a folder", "put volumes under images/ and labels/, or choose --layout")
    grouped = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            problems.append(f"{folder.name}/{path.name} is a folder; files must lie in {folder.name}/ itself")
        elif not path.name.startswith(".") and not path.name.endswith(SIDECARS):
            grouped[stem(path)].append(path)
    for paths in grouped.values():
        if len(paths) > 1:
            problems.append(f"{folder.name}/ has {' and '.join(path.name for path in paths)}; keep one of them")
    return {name: paths[0] for name, paths in grouped.items()}


def _csv(source: Path) -> Source:
    path = source if source.is_file() else _only_manifest(source)
    manifest: Manifest = read_manifest(path)
    cases = [
        Case(
            name=row.case,
            image=path.parent / row.image,
            label=path.parent / row.label,
            path=row.image.as_posix(),
            subject=row.subject,
            split=row.split,
            covariates=row.covariates,
        )
        for row in manifest.rows
    ]
    _check_cases(cases, list(manifest.problems), path, "correct the manifest; a column 'case' gives names of your own")
    facts = _read_dataset_json(path.parent) if (path.parent / "dataset.json").is_file() else {}
    return _describe("csv", path, cases, {"name": path.stem, **facts})


def _only_manifest(source: Path) -> Path:
    found = sorted(path for path in source.glob("*.csv") if is_manifest(path))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FibldmError(
            f"{source} must hold one CSV with the columns image and label; found {names}", "give the CSV file itself"
        )
    return found[0]


def _read_dataset_json(source: Path) -> dict[str, Any]:
    facts = read_json(source / "dataset.json")
    if not isinstance(facts, dict):
        raise FibldmError(f"{source / 'dataset.json'} must hold an object; got {type(facts).__name__}")
    return facts


def _check_cases(cases: list[Case], problems: list[str], source: Path, remedy: str) -> None:
    for path in (path for case in cases for path in (case.image, case.label)):
        if not path.name.endswith(SUFFIXES):
            problems.append(f"{path} is no NIfTI (.nii, .nii.gz), the only format read for now")
        elif not path.is_file():
            problems.append(f"{path} does not exist")
    problems += [f"the name {name} stands for {count} cases" for name, count in _repeated(case.name for case in cases)]
    if not cases and not problems:
        problems.append("no case was found")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise FibldmError(
            f"every case of {source} must have one image and one label; {len(problems)} findings:{listed}", remedy
        )


def _repeated(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, count) for name, count in sorted(Counter(map(str.lower, names)).items()) if count > 1]


def _describe(
    layout: str, source: Path, cases: list[Case], facts: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> Source:
    return Source(
        layout=layout,
        name=str(facts.get("name") or source.resolve().name),
        cases=tuple(sorted(cases, key=lambda case: case.name)),
        modality=_modality_text(facts.get("modality") or facts.get("channel_names")),
        labels=_label_names(facts.get("labels") or {}),
        licence=facts.get("licence") or facts.get("license"),
        references={key: str(facts[key]) for key in REFERENCE_KEYS if facts.get(key)},
        notes=notes,
    )


def _modality_text(value: Any) -> str | None:
    return ", ".join(str(name) for name in value.values()) if isinstance(value, dict) else value


def _label_names(labels: Any) -> dict[int, str]:
    """Names by value; Decathlon writes ``{"1": "name"}``, nnU-Net ``{"name": 1}``."""
    try:
        pairs = [(name, value) if isinstance(value, int) else (value, name) for name, value in labels.items()]
        return {int(value): str(name) for name, value in pairs if int(value) != 0}
    except (AttributeError, TypeError, ValueError) as error:
        raise FibldmError(
            f'labels of dataset.json must be {{"0": "background", "1": "name", ...}}; got {labels!r}'
        ) from error
