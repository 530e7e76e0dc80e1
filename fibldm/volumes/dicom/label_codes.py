"""What labels mean in coded terms: a table from label names to SNOMED CT and DICOM codes, for DICOM segmentations.

The shipped table is ``label_codes.csv``; a table of the user has the same columns and goes before it:

* ``name``, and ``synonyms`` separated by ``|``; case, hyphens and underscores make no difference
* ``category_code``, ``category_meaning``: one of DICOM's segmentation property categories (SNOMED CT)
* ``type_scheme`` (``SCT`` or ``DCM``), ``type_code``, ``type_meaning``: what the label is
* ``modifier_code``, ``modifier_meaning``: the side or part, such as left (SNOMED CT); may be empty
* ``region_code``, ``region_meaning``: where a finding lies (SNOMED CT); may be empty
* ``colour``: recommended display colour, ``#rrggbb``
"""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydicom.sr.coding import Code

from fibldm.errors import FibldmError

SHIPPED = Path(__file__).with_name("label_codes.csv")
COLUMNS = (
    *("name", "synonyms", "category_code", "category_meaning", "type_scheme", "type_code", "type_meaning"),
    *("modifier_code", "modifier_meaning", "region_code", "region_meaning", "colour"),
)
_NEEDED = ("name", "category_code", "category_meaning", "type_scheme", "type_code", "type_meaning", "colour")
_CODE = re.compile(r"[0-9]{5,18}")
_LONGEST_MEANING = 64


@dataclass(frozen=True)
class LabelCode:
    """The coded meaning of one label.

    Attributes:
        category: segmentation property category, such as anatomical structure.
        type: what the label is, such as lung.
        modifier: its side or part, or ``None``.
        region: where a finding lies, or ``None``.
        colour: recommended for display, red, green, blue in 0..255.
    """

    category: Code
    type: Code
    modifier: Code | None
    region: Code | None
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class LabelCodes:
    """Coded meanings by label name, as read by `load_label_codes`."""

    by_name: Mapping[str, LabelCode]

    def find(self, names: Iterable[str]) -> dict[str, LabelCode]:
        """The coded meaning of each name.

        Raises:
            FibldmError: lists the names that no table has.
        """
        names = list(names)
        unknown = [name for name in names if _plain(name) not in self.by_name]
        if unknown:
            raise FibldmError(
                f"a DICOM segmentation needs a coded meaning for every label; there is none for {', '.join(unknown)}",
                f"give `label_codes` FILE, a CSV with the columns {','.join(COLUMNS)}",
            )
        return {name: self.by_name[_plain(name)] for name in names}


def load_label_codes(file: Path | None = None) -> LabelCodes:
    """The shipped table, with the rows of ``file`` before it.

    Raises:
        FibldmError: the file cannot be read, lacks a column, or has rows without a sound code; all of them are listed.
    """
    own = _read(file) if file is not None else {}
    return LabelCodes(_read(SHIPPED) | own)


def _read(file: Path) -> dict[str, LabelCode]:
    remedy = f"write it as CSV in UTF-8 with the columns {','.join(COLUMNS)}"
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FibldmError(f"{file.name} must be a readable table of label codes; {error}", remedy) from error
    lacking = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if lacking:
        raise FibldmError(f"{file.name} must have all columns of label codes; it lacks {', '.join(lacking)}", remedy)
    faults = [f"row {number}: {fault}" for number, row in enumerate(rows, start=2) if (fault := _fault(row))]
    if faults:
        raise FibldmError(f"{file.name} must give sound codes; {'; '.join(faults)}", remedy)
    return _by_name(file, rows)


def _by_name(file: Path, rows: list[dict[str, str]]) -> dict[str, LabelCode]:
    codes: dict[str, LabelCode] = {}
    for row in rows:
        synonyms = [synonym for synonym in row["synonyms"].split("|") if synonym.strip()]
        for name in {_plain(name) for name in (row["name"], *synonyms)}:
            if name in codes:
                raise FibldmError(f"{file.name} must give every name once; {name} comes twice", "take one row out")
            codes[name] = _label_code(row)
    return codes


def _fault(row: Mapping[str, str | None]) -> str:
    """What is wrong with a row, or nothing."""
    if None in row or any(row[column] is None for column in COLUMNS):
        return f"must have {len(COLUMNS)} fields"
    filled = {column: str(row[column]).strip() for column in COLUMNS}
    empty = [column for column in _NEEDED if not filled[column]]
    if empty:
        return f"{', '.join(empty)} must not be empty"
    if filled["type_scheme"] not in ("SCT", "DCM"):
        return f"type_scheme must be SCT or DCM, got {filled['type_scheme']!r}"
    if not re.fullmatch("#[0-9a-fA-F]{6}", filled["colour"]):
        return f"colour must be #rrggbb, got {filled['colour']!r}"
    for part in ("category", "type", "modifier", "region"):
        code, meaning = filled[f"{part}_code"], filled[f"{part}_meaning"]
        if bool(code) != bool(meaning) or (code and not _CODE.fullmatch(code)) or len(meaning) > _LONGEST_MEANING:
            return f"{part} must be a code of digits and a meaning of up to {_LONGEST_MEANING} characters"
    return ""


def _label_code(row: Mapping[str, str]) -> LabelCode:
    red, green, blue = bytes.fromhex(row["colour"].strip().removeprefix("#"))
    return LabelCode(
        category=_code(row, "category"),
        type=_code(row, "type", row["type_scheme"].strip()),
        modifier=_code(row, "modifier") if row["modifier_code"].strip() else None,
        region=_code(row, "region") if row["region_code"].strip() else None,
        colour=(red, green, blue),
    )


def _code(row: Mapping[str, str], part: str, scheme: str = "SCT") -> Code:
    return Code(row[f"{part}_code"].strip(), scheme, row[f"{part}_meaning"].strip())


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[-_]", " ", name).lower().split())
