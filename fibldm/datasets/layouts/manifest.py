"""Read tables: a manifest with one case a row, the older label.csv, columns of covariates."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fibldm.datasets.findings import Findings
from fibldm.errors import FibldmError, shown
from fibldm.volumes.formats.readers import stem
from fibldm.volumes.scan import Covariate

IMAGE = "image"
CHANNEL_MARK = "image:"
LABEL = "label"
SECOND_IMAGE = "second_image"
OPTIONAL = ("case", "subject", "split")
RESERVED = (IMAGE, LABEL, SECOND_IMAGE, *OPTIONAL)
SPLIT_NAMES = {
    "train": "training",
    "training": "training",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
MISSING = ("", "na", "n/a", "nan", "none", "null")
LEGACY_NAMES = ("label.csv", "labels.csv")

_DAY = r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"
_NUMBER = re.compile(rf"(?!{_DAY}$)-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d{{1,2}})?")
_CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LIKELY_MEANT = {
    LABEL: ("mask", "seg", "segmentation"),
    "subject": ("patient", "pat", "pid", "patid", "patientid", "participant", "participantid", "subjectid", "sub"),
    "split": ("fold", "set", "partition"),
}
"""Names that other tables give to a column of ours, without spaces, dashes and underscores."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        line: of the file, for messages.
        images: one path a channel, as written.
        values: what stands in the other columns of ours: `LABEL`, `SECOND_IMAGE` and `OPTIONAL`; the first two may be
            empty.
        covariates: what stands in the others; ``None`` for a missing value.
    """

    line: int
    images: tuple[Path, ...]
    values: Mapping[str, str]
    covariates: Mapping[str, Covariate]

    @property
    def case(self) -> str:
        """The name of the case; one that the manifest does not give is parent folder and stem of the first image.

        So many files called ``ct.nii.gz`` get names of their own.
        """
        name, folder = stem(self.images[0]), self.images[0].parent.name.strip(".")
        return self.values.get("case") or (f"{folder}_{name}" if folder else name)


def is_manifest(path: Path) -> bool:
    """Whether a CSV or TSV file has a column ``image`` (or ``image:CHANNEL``), or is an older ``label.csv``."""
    try:
        columns = read_table(path)[0]
    except FibldmError:
        return False
    return bool(_image_columns(columns)) or _is_legacy(path, columns)


def read_manifest(path: Path, findings: Findings) -> tuple[tuple[str, ...], list[Row]]:
    """Channels and rows of a manifest with the column image, or one column ``image:NAME`` a channel, as ``image:T1``.

    Optional columns: label and second_image (may be empty: a case without one), case, subject, split. Every other
    column is a covariate, a number where all its values are numbers; an empty value becomes ``None``. A file called
    label.csv or labels.csv without the columns image and label has the image in its first and the mask in its second
    column, under any header. Rows that are wrong, and columns that are left out, go to ``findings``.

    Raises:
        FibldmError: the file is no CSV text, or a required column is missing or stands twice.
    """
    columns, lines = read_table(path)
    if _is_legacy(path, columns):
        lines = _legacy_lines(path, columns, lines, findings)
        columns = [IMAGE, LABEL]
    _check_columns(path, columns)
    records = {}
    for line, values in lines:
        if len(values) != len(columns):
            findings.error(f"{path.name} line {line} has {len(values)} values for {len(columns)} columns")
        else:
            records[line] = dict(zip(columns, values, strict=True))
    wrong = {line: _row_problems(record) for line, record in records.items()}
    for line, problems in wrong.items():
        findings.add((("error", problem) for problem in problems), f"{path.name} line {line}: ")
    sound = {line: record for line, record in records.items() if not wrong[line]}
    others = [name for name in columns if name not in RESERVED and not name.startswith(CHANNEL_MARK)]
    known, images = covariates(others, list(sound.values()), findings), _image_columns(columns)
    rows = [
        Row(line, tuple(Path(record[name]) for name in images), record, more)
        for (line, record), more in zip(sound.items(), known, strict=True)
    ]
    return tuple(name.removeprefix(CHANNEL_MARK) for name in images), rows


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Column names, and (line number, values) of every row that is not empty; separated by comma, semicolon or tab.

    Raises:
        FibldmError: the file cannot be read as CSV text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            reader = csv.reader(stream, delimiter=max(",;\t", key=first.count), strict=True)
            columns = [_known(name.strip()) for name in next(reader, [])]
            rows = [(reader.line_num, [value.strip() for value in row]) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FibldmError(f"{path} must be a CSV file in UTF-8; {error}") from error
    return columns, rows


def read_records(path: Path, key: str) -> tuple[list[str], list[dict[str, str]]]:
    """Column names, and the values of every row by column, of a table with the column ``key``.

    Raises:
        FibldmError: the file cannot be read as CSV text, the column is missing, or a row has too few or many values.
    """
    columns, table = read_table(path)
    if key not in columns or any(len(values) != len(columns) for _, values in table):
        raise FibldmError(f"{path} must have a column {key}, and a value for every column in every line")
    return columns, [dict(zip(columns, values, strict=True)) for _, values in table]


def covariates(
    columns: Sequence[str], records: Sequence[Mapping[str, str]], findings: Findings
) -> list[dict[str, Covariate]]:
    """The values of ``columns`` for every record; columns that are left out are noted.

    A column becomes numbers where all its values are numbers (eight digits that are a date are none).
    """
    names = [name for name in columns if name and name not in RESERVED]
    values = {name: _typed([record[name] for record in records]) for name in names}
    if reserved := [name for name in columns if name in RESERVED]:
        findings.notes.append(f"columns whose name has a meaning of its own are left out: {', '.join(reserved)}")
    return [{name: values[name][index] for name in names} for index in range(len(records))]


def _known(column: str) -> str:
    """Columns of ours are known in any case."""
    name = column.lower()
    return name if name in RESERVED else column


def split_name(text: str) -> str:
    """The split that ``text`` names: ``training``, ``validation`` or ``test``.

    Raises:
        FibldmError: it names none.
    """
    if text.lower() not in SPLIT_NAMES:
        raise FibldmError(f"split must be one of {', '.join(SPLIT_NAMES)}; got {shown(text)}")
    return SPLIT_NAMES[text.lower()]


def _image_columns(columns: Iterable[str]) -> list[str]:
    return [name for name in columns if name == IMAGE or name.startswith(CHANNEL_MARK)]


def _is_legacy(path: Path, columns: Sequence[str]) -> bool:
    complete = bool(_image_columns(columns)) and LABEL in columns
    return path.name.lower() in LEGACY_NAMES and len(columns) > 1 and not complete


def _legacy_lines(
    path: Path, columns: list[str], lines: Sequence[tuple[int, list[str]]], findings: Findings
) -> list[tuple[int, list[str]]]:
    if any((path.parent / name).is_file() for name in columns[:2] if name):
        raise FibldmError(
            f"the first line of {path} must be a header; it names files", "put a line such as image,mask above"
        )
    if len(columns) > 2:
        findings.notes.append(f"columns of {path.name} beyond the second are left out: {len(columns) - 2}")
    pairs = {line: values[:2] for line, values in lines if len(values) > 1 and all(values[:2])}
    for line, _ in lines:
        if line not in pairs:
            findings.error(f"{path.name} line {line} must have an image and a mask")
    return list(pairs.items())


def _check_columns(path: Path, columns: list[str]) -> None:
    images = _image_columns(columns)
    repeated = sorted({name for name in columns if name and columns.count(name) > 1})
    if not images or repeated:
        raise FibldmError(
            f"{path} must have the column image (or one column image:NAME a channel) and may have label, each column "
            f"once; missing: {'none' if images else IMAGE}; repeated: {', '.join(repeated) or 'none'}; it has "
            f"{', '.join(columns) or 'none'}"
        )
    if IMAGE in images and len(images) > 1 or CHANNEL_MARK in images:
        raise FibldmError(
            f"{path} must have either the column image or one column image:NAME a channel; it has {', '.join(images)}"
        )
    for wanted, others in _LIKELY_MEANT.items():
        found = [name for name in columns if re.sub(r"[\s_-]", "", name.lower()) in others]
        if found and wanted not in columns:
            raise FibldmError(
                f"{path} has no column {wanted}, but {', '.join(found)}, which may be meant",
                f"rename it to {wanted} if it is, or take it out",
            )


def _row_problems(record: Mapping[str, str]) -> list[str]:
    needed = (*_image_columns(record), *OPTIONAL)
    problems = [f"{name} is empty" for name in needed if record.get(name) == ""]
    split, case = record.get("split"), record.get("case")
    if split and split.lower() not in SPLIT_NAMES:
        problems.append(f"split must be one of {', '.join(SPLIT_NAMES)}; got {shown(split)}")
    if case and not _CASE_NAME.fullmatch(case):
        problems.append("case must be letters, digits, '.', '_' and '-', the first a letter or digit")
    return problems


def _typed(values: list[str]) -> list[Covariate]:
    known = [value for value in values if value.lower() not in MISSING]
    numeric = bool(known) and all(_NUMBER.fullmatch(value) for value in known)
    return [None if value.lower() in MISSING else float(value) if numeric else value for value in values]
