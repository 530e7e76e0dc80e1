"""The volumes of an item: all of them or none, and by names that tell no patient."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fibldm.errors import FibldmError
from fibldm.serving.folders import publish
from fibldm.serving.items import Opened, linked
from fibldm.synthesis import Output, jobs_of
from fibldm.synthesis.asked import COVARIATES, read


def make(
    output: Output, item: Opened, staging: Path, place: Path, report: Callable[[int], None] = lambda made: None
) -> list[Path]:
    """Volumes of every mask of an item; those that lie at its place already are of the same content and options.

    Args:
        output: how volumes are made; its folder and settings do not matter.
        item: what is made.
        staging: folder of the volumes while they are made, on the file system of ``place``.
        place: folder where they appear, all at once.
        report: is told after every volume how many are made.

    Returns:
        Files of volumes, or folders of series.

    Raises:
        FibldmError: a mask is refused, see `Output.write`.
    """
    if not place.exists():
        try:
            _write(replace(output, folder=staging, settings=item.settings), item.masks, report)
            publish(staging, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    there = replace(output, folder=place, settings=item.settings)
    return [there.path(job) for job in jobs_of(map(Path, item.masks), {}, item.settings.count)]


def told(output: Output, item: Opened) -> str:
    """What was asked of an item beside its masks, for a log."""
    kinds = output.synthesizer.beside
    values = read(kinds, item.settings.asked)
    said = [(name, kind.told(values[name])) for name, kind in kinds.items() if kind.parts]
    return "; ".join(text if name == COVARIATES else f"{name} {text}" for name, text in said)


def unexpected(error: Exception, remedy: str) -> FibldmError:
    """An error that nobody foresaw, in a line that names no file."""
    what = error.strerror if isinstance(error, OSError) else error  # its text would name files
    return FibldmError(f"unexpected error: {type(error).__name__}: {what}".splitlines()[0], remedy)


def _write(output: Output, masks: Mapping[str, Path], report: Callable[[int], None]) -> None:
    """By aliases, so that no name reaches a sidecar or a message."""
    made = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, file in masks.items():
            alias = linked(file, Path(folder) / Path(name).stem, name)
            for job in jobs_of([alias], output.synthesizer.names, output.settings.count):
                output.write([job])
                made += 1
                report(made)
