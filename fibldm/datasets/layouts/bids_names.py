"""How BIDS names files: entities such as sub-01, a suffix such as T1w, and side files that several files inherit."""

from collections.abc import Iterator
from pathlib import Path

from fibldm.datasets.layouts.entries import visible
from fibldm.volumes.formats.readers import stem

NIFTI = (".nii", ".nii.gz")


def is_nifti(path: Path) -> bool:
    """Whether a file that is not hidden is named as NIfTI."""
    return path.name.lower().endswith(NIFTI) and not path.name.startswith(".")


def entities(path: Path) -> set[str]:
    """The entities of a file name, as ``{"sub-01", "run-2"}``."""
    return set(_name(path).split("_")[:-1])


def suffix(path: Path) -> str:
    """The last part of a file name before its ending, as ``T1w``."""
    return _name(path).split("_")[-1]


def entity(path: Path, key: str) -> str | None:
    """The value of one entity, ``None`` where the name does not have it."""
    return next((part.partition("-")[2] for part in sorted(entities(path)) if part.startswith(f"{key}-")), None)


def ends_with(path: Path, ending: str) -> bool:
    """Whether the name ends with whole parts, as ``sub-01_run-1_T1w.nii.gz`` does with ``T1w`` and ``run-1_T1w``."""
    return f"_{_name(path)}".endswith(f"_{ending}")


def inherited(path: Path, root: Path, ending: str) -> Iterator[Path]:
    """The side files with ``ending`` that apply to ``path``, from ``root`` down: equal suffix, no further entity.

    Inheritance principle: https://bids-specification.readthedocs.io/en/stable/common-principles.html
    """
    for folder in reversed([folder for folder in path.parents if folder == root or root in folder.parents]):
        for file in visible(folder):
            if file.name.endswith(ending) and suffix(file) == suffix(path) and entities(file) <= entities(path):
                yield file


def _name(path: Path) -> str:
    return path.stem if path.suffix in (".json", ".tsv") else stem(path)
