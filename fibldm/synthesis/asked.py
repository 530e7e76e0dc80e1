"""What is asked of volumes beside their masks: of all of them, of each by a table, or what the data say of its case.

All of it is one mapping: from the name of a condition to what is asked of it, a text or a plain value. Covariates are
one of the conditions, asked for by a mapping of their own names; people name them without it, as in a row of a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibldm.datasets.layouts.manifest import read_records
from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.models.conditions.condition import Condition
from fibldm.synthesis.scans import AskedScan
from fibldm.volumes.datalist import SECOND_IMAGE, SPLITS, known_of, read_datalist
from fibldm.volumes.grid import Grid
from fibldm.volumes.masks import mask_stem

COVARIATES = "covariates"
MASK = "mask"
Asked = Mapping[str, Any]
Table = str | Path | Sequence[Mapping[str, Any]] | Mapping[str, Any]

_SHOWN = 10  # names in one error


def together(covariates: Mapping[str, Any], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of what is asked apart: covariates, and further conditions, each by their names.

    Raises:
        FibldmError: covariates are among the further conditions.
    """
    if COVARIATES in conditions:
        raise FibldmError(
            "covariates are asked for by their own names, and are no further condition; got them among these",
            "name each of them in covariates, or by --covariate NAME=VALUE",
        )
    return {**({COVARIATES: dict(covariates)} if covariates else {}), **conditions}


def laid_over(under: Asked, *over: Asked) -> dict[str, Any]:
    """What is asked, where what comes later goes before; of covariates, each by itself."""
    made = dict(under)
    for one in over:
        known = {**(made.get(COVARIATES) or {}), **(one.get(COVARIATES) or {})}
        made = {**made, **one, **({COVARIATES: known} if known else {})}
    return made


def check_names(further: Sequence[str], asked: Asked) -> None:
    """Refuse conditions that training did not have.

    Args:
        further: names of those that it had, beside mask and covariates.
        asked: what is asked.

    Raises:
        FibldmError: names all.
    """
    if strange := asked.keys() - {COVARIATES, *further}:
        raise FibldmError(
            f"further conditions must be those of training ({', '.join(further) or 'none'}); "
            f"there is no {', '.join(sorted(strange))}"
        )


def read(kinds: Mapping[str, Condition], asked: Asked) -> dict[str, Any]:
    """The value of every condition, as it reads what is asked of it; of one of which nothing is asked, too.

    Args:
        kinds: the conditions beside the mask, by name.
        asked: what is asked.

    Raises:
        FibldmError: there is no such condition, or it cannot be asked so.
    """
    check_names([name for name in kinds if name != COVARIATES], asked)
    opened = {name: AskedScan.open(asked.get(name)) for name, kind in kinds.items() if kind.of_scan}
    return {name: kind.read({**asked, **opened}.get(name)) for name, kind in kinds.items()}


def within(kinds: Mapping[str, Condition], values: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """Values, as `read` gives them, as they are meant for the volume on a grid; see `Condition.within`.

    Raises:
        FibldmError: one does not fit that volume.
    """
    return {name: kind.within(values[name], grid) for name, kind in kinds.items()}


def meant(kinds: Mapping[str, Condition], asked: Asked, grid: Grid) -> dict[str, Any]:
    """What is asked, where that may be relative to a volume: as it is meant for the one on a grid.

    Raises:
        FibldmError: see `read` and `within`.
    """
    values = read(kinds, asked)
    placed = within(kinds, values, grid)
    return {**asked, **{name: part for name, part in placed.items() if part is not values[name]}}


def check(kinds: Mapping[str, Condition], values: Mapping[str, Any], *, allow: bool) -> list[str]:
    """What of values, as `read` gives them, lies outside of training, in words; see `Condition.check`.

    Raises:
        FibldmError: something does and ``allow`` is False.
    """
    return [finding for name, kind in kinds.items() for finding in kind.check(values[name], allow=allow)]


@dataclass(frozen=True)
class ConditionsTable:
    """What is asked of each mask by itself.

    Attributes:
        rows: values by name, covariates and further conditions alike, by mask: its file name, with suffixes or without.
        where: it stands, for errors.
        folder: to which paths in it are relative.
    """

    rows: Mapping[str, Mapping[str, Any]]
    where: str = "the conditions table"
    folder: Path = Path()

    @classmethod
    def read(cls, table: Table) -> "ConditionsTable":
        """A table from a CSV or JSON file, or from plain values.

        Args:
            table: a CSV file with the column ``mask``, of which an empty cell is unknown; a JSON file, or values as one
                holds them: a list of rows, each with ``mask``, or a mapping from mask to row; null is unknown.

        Raises:
            FibldmError: the file cannot be read, is no such table, or names a column or a mask twice.
        """
        if not isinstance(table, str | Path):
            return cls._of(table, "the conditions table")
        if Path(table).suffix.lower() == ".json":
            return cls._of(read_json(Path(table)), str(table), Path(table).parent)
        columns, records = read_records(Path(table), MASK)
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise FibldmError(f"every column of {table} needs a name of its own; given twice: {', '.join(twice)}")
        rows = [{name: value or None for name, value in record.items()} for record in records]
        return cls._of(rows, str(table), Path(table).parent)

    @classmethod
    def _of(cls, content: Any, where: str, folder: Path = Path()) -> "ConditionsTable":
        if isinstance(content, Mapping):
            content = [_named(mask, row) for mask, row in content.items()]
        rows = content if isinstance(content, list | tuple) else [content]
        if not all(isinstance(row, Mapping) and isinstance(row.get(MASK), str) and row[MASK] for row in rows):
            raise FibldmError(
                f"every row of {where} must name its mask and hold values by name; one does not",
                'such as [{"mask": "a.nii.gz", "age": 63}], or {"a.nii.gz": {"age": 63}}',
            )
        names = [row[MASK] for row in rows]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise FibldmError(f"{where} must have one row a mask; given twice: {_listed(twice)}")
        return cls({row[MASK]: {name: row[name] for name in row if name != MASK} for row in rows}, where, folder)

    def check_masks(self, masks: Sequence[Path]) -> None:
        """See that every mask has one row, and every row a mask: a row that is missing may have a mistyped name.

        Raises:
            FibldmError: names those that do not.
        """
        rows = {mask.name: self._rows_of(mask) for mask in masks}
        of_masks = {row for found in rows.values() for row in found}
        wrong = {
            "there is no row of": [name for name, found in rows.items() if not found],
            "there are two rows of": [name for name, found in rows.items() if len(found) > 1],
            "there is no mask of the row": [row for row in self.rows if row not in of_masks],
        }
        if told := [f"{what} {_listed(names)}" for what, names in wrong.items() if names]:
            raise FibldmError(
                f"{self.where} must have one row a mask, and no others; {'; '.join(told)}",
                "where nothing is known of a mask, give a row whose other cells are empty",
            )

    def of(self, mask: Path, kinds: Mapping[str, Condition]) -> dict[str, Any]:
        """What is asked of a mask, by condition.

        Args:
            mask: its file.
            kinds: the conditions beside the mask, by name.

        Raises:
            FibldmError: it has no row, or there is no condition of the name of a column.
        """
        rows = self._rows_of(mask)
        if len(rows) != 1:
            self.only([mask]).check_masks([mask])
        values, further = self.rows[rows[0]], [name for name in kinds if name != COVARIATES]
        covariates = kinds[COVARIATES].parts if COVARIATES in kinds else ()
        if strange := [name for name in values if (name in further) == (name in covariates)]:
            raise FibldmError(
                f"columns of {self.where} must be mask, and each either a covariate of training "
                f"({', '.join(covariates) or 'none'}) or a further condition ({', '.join(further) or 'none'}); "
                f"{_listed(strange)} is not"
            )
        known = {name: value for name, value in values.items() if name in covariates}
        asked = {name: value for name, value in values.items() if name in further}
        paths = {name: self.folder / path for name, path in asked.items() if kinds[name].of_scan and _is_path(path)}
        return together(known, {**asked, **paths})

    def only(self, masks: Sequence[Path]) -> "ConditionsTable":
        """The rows of some masks alone."""
        names = {name for mask in masks for name in self._rows_of(mask)}
        rows = {name: row for name, row in self.rows.items() if name in names}
        return ConditionsTable(rows, self.where, self.folder)

    def _rows_of(self, mask: Path) -> list[str]:
        """The names under which a mask has a row."""
        return [name for name in dict.fromkeys((mask.name, mask_stem(mask))) if name in self.rows]


def known_cases(work: str | Path) -> dict[Path, Mapping[str, Any]]:
    """What the data say of the cases of a work folder, by the files of their masks.

    Raises:
        FibldmError: the folder holds no datalist.
    """
    cases = read_datalist(work)
    entries = [entry for split in SPLITS for entry in cases[split] if "label" in entry]
    second = (SECOND_IMAGE,)  # a file, which is no covariate
    return {
        Path(entry["label"]).resolve(): known_of(entry) | {name: entry[name] for name in second if name in entry}
        for entry in entries
    }


def own(kinds: Mapping[str, Condition], cases: Mapping[Path, Mapping[str, Any]], mask: Path, said: Asked) -> Asked:
    """What the data say of the case of a mask, by condition.

    Args:
        kinds: the conditions beside the mask, by name.
        cases: see `known_cases`.
        mask: its file.
        said: what is asked of it otherwise; of further conditions that are there, the data are not asked.

    Raises:
        FibldmError: the mask is of none of the cases, or the data do not tell of a condition.
    """
    known = cases.get(mask.resolve())
    if known is None:
        raise FibldmError(
            f"own conditions are those of cases of the work folder; {mask} is no mask of one",
            "give the masks by `data`, or what is known of them by `conditions_table`",
        )
    return {name: kind.own(known) for name, kind in kinds.items() if name == COVARIATES or name not in said}


def _named(mask: Any, row: Any) -> Any:
    return {**row, MASK: mask} if isinstance(row, Mapping) and MASK not in row else None


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
