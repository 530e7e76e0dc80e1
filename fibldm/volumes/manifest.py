"""Read a CSV manifest: one case a row, with patient, split and covariates where they are known (A2, B5)."""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fibldm.errors import FibldmError

REQUIRED = ("image", "label")
OPTIONAL = ("case", "subject", "split")
SPLIT_NAMES = {
    "train": "training",
    "training": "training",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
MISSING = ("", "na", "n/a", "nan", "none", "null")

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d{1,2})?")
_CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Row:
    """One row: paths as written, ``None`` for what the manifest does not say, covariates by column."""

    image: Path
    label: Path
    case: str
    subject: str | None
    split: str | None
    covariates: Mapping[str, str | float | None]


@dataclass(frozen=True)
class Manifest:
    """The rows that could be read, and what is wrong with the others, one sentence each."""

    rows: tuple[Row, ...]
    problems: tuple[str, ...]


def is_manifest(path: Path) -> bool:
    """Whether a CSV file has the columns ``image`` and ``label``."""
    try:
        return set(REQUIRED) <= set(_read_table(path)[0])
    except FibldmError:
        return False


def read_manifest(path: Path) -> Manifest:
    """The rows of a manifest with the columns image, label and optionally case, subject, split and covariates.

    A covariate column becomes numbers where all its values are numbers; an empty value becomes ``None``.

    Raises:
        FibldmError: the file is no CSV text, or a required column is missing or stands twice.
    """
    columns, table = _read_table(path)
    missing = [name for name in REQUIRED if name not in columns]
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if missing or repeated:
        raise FibldmError(
            f"{path} must have the columns image and label, each column once; missing: {', '.join(missing) or 'none'}; "
            f"repeated: {', '.join(repeated) or 'none'}; it has {', '.join(columns) or 'none'}"
        )
    ragged = [
        f"{path.name} line {line} has {len(values)} values for {len(columns)} columns"
        for line, values in table
        if len(values) != len(columns)
    ]
    numbered = [
        (line, dict(zip(columns, values, strict=True))) for line, values in table if len(values) == len(columns)
    ]
    problems = [f"{path.name} line {line}: {problem}" for line, record in numbered for problem in _row_problems(record)]
    records = [record for _, record in numbered if not _row_problems(record)]
    covariates = _covariates(columns, records)
    rows = [_row(record, values) for record, values in zip(records, covariates, strict=True)]
    return Manifest(tuple(rows), (*ragged, *problems))


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Column names, and (line number, values) of every row that is not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            reader = csv.reader(stream, delimiter=max(",;\t", key=first.count), strict=True)
            columns = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, [value.strip() for value in row]) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FibldmError(f"{path} must be a CSV file in UTF-8; {error}") from error
    return columns, rows


def _row_problems(record: Mapping[str, str]) -> list[str]:
    problems = [f"{name} is empty" for name in REQUIRED + OPTIONAL if record.get(name) == ""]
    split, case = record.get("split"), record.get("case")
    if split and split.lower() not in SPLIT_NAMES:
        problems.append(f"split must be one of {', '.join(SPLIT_NAMES)}; got {split!r}")
    if case and not _CASE_NAME.fullmatch(case):
        problems.append(f"case must be letters, digits, '.', '_' and '-'; got {case!r}")
    return problems


def _row(record: Mapping[str, str], covariates: Mapping[str, str | float | None]) -> Row:
    image, split = Path(record["image"]), record.get("split")
    return Row(
        image=image,
        label=Path(record["label"]),
        case=record.get("case") or _derived_name(image),
        subject=record.get("subject"),
        split=SPLIT_NAMES[split.lower()] if split else None,
        covariates=covariates,
    )


def _derived_name(image: Path) -> str:
    """Parent folder and stem, so that many files called ``ct.nii.gz`` get names of their own."""
    stem = image.name.removesuffix(".gz").removesuffix(".nii")
    folder = image.parent.name.strip(".")
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{folder}_{stem}" if folder else stem)


def _covariates(columns: list[str], records: list[dict[str, str]]) -> list[dict[str, str | float | None]]:
    names = [name for name in columns if name and name not in REQUIRED + OPTIONAL]
    values = {name: _typed([record[name] for record in records]) for name in names}
    return [{name: values[name][index] for name in names} for index in range(len(records))]


def _typed(values: list[str]) -> list[str | float | None]:
    known = [value for value in values if value.lower() not in MISSING]
    numeric = bool(known) and all(_NUMBER.fullmatch(value) for value in known)
    return [None if value.lower() in MISSING else float(value) if numeric else value for value in values]
