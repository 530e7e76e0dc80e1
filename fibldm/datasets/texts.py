"""What is written of each case: a column of a table, or a file beside the image; carried along only if asked for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fibldm.datasets.findings import Findings
from fibldm.datasets.source import Case
from fibldm.errors import FibldmError
from fibldm.volumes.formats.readers import stem

TEXT = "text"
"""What the text of a case is called in the work folder, wherever it comes from."""
BESIDE = "beside"

_SHOWN = 5


def with_texts(cases: Sequence[Case], where: str, findings: Findings) -> list[Case]:
    """The cases with what is written of them, which is noted.

    Args:
        cases: as found.
        where: name of a column, or `BESIDE`: ``NAME.txt`` in UTF-8 beside the image ``NAME``, or beside the folder of
            its slices.
        findings: gets the note.

    Raises:
        FibldmError: there is no such column, no such file, or a file that cannot be read; or another column has the
            name of the text.
    """
    columns = sorted({name for case in cases for name in case.covariates})
    if where == BESIDE:
        texts = _beside(cases)
    elif where in columns:
        texts = [None if (value := case.covariates.get(where)) is None else _written(value) for case in cases]
    else:
        raise FibldmError(
            f"`text` must be a column, or {BESIDE} for .txt files; there is no {where!r} among "
            f"{', '.join(columns) or 'no columns'}"
        )
    if TEXT in columns and where != TEXT:
        raise FibldmError(
            f"the text is kept as {TEXT!r}, which is the name of another column", f"rename it, or give {TEXT} as `text`"
        )
    told = [text for text in texts if text]
    if not told:
        raise FibldmError(f"`text` must find texts in {where}; there is none in {len(cases)} cases", "leave it out")
    findings.notes.append(
        f"what is written of {len(told)} of {len(cases)} cases ({len(set(told))} different texts, --text {where}) is "
        "carried along as it is: read it before work folder, run or weights leave the house, as nothing here looks for "
        "names and dates in it"
    )
    return [_told(case, text or None, where) for case, text in zip(cases, texts, strict=True)]


def _told(case: Case, text: str | None, where: str) -> Case:
    others = {name: value for name, value in case.covariates.items() if name != where}
    return replace(case, covariates={**others, TEXT: text})


def _written(value: object) -> str:
    return " ".join((f"{value:.15g}" if isinstance(value, float) else str(value)).split())


def _beside(cases: Sequence[Case]) -> list[str | None]:
    texts: list[str | None] = []
    wrong: list[str] = []
    for case in cases:
        file = next((file for file in _places(case) if file.is_file()), None)
        try:
            texts.append(None if file is None else _written(file.read_text(encoding="utf-8-sig")))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            wrong.append(f"{'a DICOM case' if case.private else case.name} ({reason})")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise FibldmError(f".txt files must be readable text in UTF-8; not of {', '.join(wrong[:_SHOWN])}{more}")
    return texts


def _places(case: Case) -> list[Path]:
    files = case.images[0] if case.images else ()
    if not files:
        return []
    folder = files[0].parent
    own = folder / f"{stem(files[0])}.txt"
    of_folder = folder.parent / f"{folder.name}.txt"
    return [of_folder] if len(files) > 1 else [own, of_folder] if case.private else [own]
