"""A synthesis as items that an engine hands out: looks at masks, and batches of volumes to draw and write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fibldm.errors import FibldmError
from fibldm.progress import track
from fibldm.shards import Shard
from fibldm.synthesis.checking import Rejected
from fibldm.synthesis.mask_source import Job, MaskSource, together
from fibldm.synthesis.outputs import Output, refusal, tell_unmarked
from fibldm.synthesis.settings import SynthesisSettings
from fibldm.synthesis.synthesizer import Synthesizer
from fibldm.workers import Engine, Work

Named = tuple[Path | None, str | None, int]
"""A volume for another process: the file of its mask, the SHA-256 of that where it is known, and its number."""


@dataclass(frozen=True)
class Generator:
    """Which weights draw.

    Attributes:
        run_dir: see `Synthesizer.from_run`, as are ``unconditional``, ``checkpoint``, ``strength`` and ``others``; None
            where there is a bundle.
        bundle: see `Synthesizer.from_bundle`, as is ``trust``.
    """

    run_dir: str | Path | None
    bundle: str | Path | None
    unconditional: bool
    trust: bool
    checkpoint: str
    strength: float
    others: Mapping[str | Path, float] | None

    def loaded(self, device: str | torch.device) -> Synthesizer:
        """The generator on a device.

        Raises:
            FibldmError: the run or the bundle is refused.
        """
        if self.run_dir is None:
            assert self.bundle is not None
            return Synthesizer.from_bundle(self.bundle, trust=self.trust, device=device)
        choices: dict[str, Any] = {"checkpoint": self.checkpoint, "strength": self.strength, "others": self.others}
        return Synthesizer.from_run(self.run_dir, unconditional=self.unconditional, **choices, device=device)


def own_device() -> str:
    """CUDA where there is some, of several devices this process's own; else the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{Shard.from_environment().local % count}" if count else "cpu"


@dataclass
class Desk:
    """An output in the process that writes it, with the masks that it has seen."""

    output: Output
    sources: dict[Path, MaskSource] = field(default_factory=dict)

    def jobs(self, named: Sequence[Named]) -> list[Job]:
        """The volumes, those of one mask with the same `MaskSource`."""
        return [Job(None if file is None else self._source(file, sha256), number) for file, sha256, number in named]

    def _source(self, file: Path, sha256: str | None) -> MaskSource:
        if file not in self.sources:
            self.sources[file] = MaskSource(file, self.output.synthesizer.names)
            if sha256 is not None:
                self.sources[file].expect(sha256)
        return self.sources[file]


@dataclass(frozen=True)
class DeskKit:
    """What a process needs to draw.

    Attributes:
        generator: which weights.
        folder: to write to.
        settings: what is asked.
        device: None is the process's own, see `own_device`.
        here: that of this process; others make their own.
    """

    generator: Generator
    folder: Path
    settings: SynthesisSettings
    device: str | torch.device | None
    here: Desk | None = field(default=None, compare=False)

    def __call__(self) -> Desk:
        if self.here is not None:
            return self.here
        return Desk(Output(self.generator.loaded(self.device or own_device()), self.folder, self.settings))

    def __getstate__(self) -> dict[str, Any]:
        plain = replace(self.settings, files=replace(self.settings.files))  # without what is read of their files
        return {**self.__dict__, "settings": plain, "here": None}


def missing(engine: Engine, kit: DeskKit, jobs: Sequence[Job], *, shown: bool) -> list[Job]:
    """The jobs whose volumes do not lie there yet, after a look at all their masks.

    Args:
        engine: looks.
        kit: of this process, among others.
        jobs: all of them.
        shown: whether there is a bar.

    Raises:
        FibldmError: see `Output.missing`.
    """
    assert kit.here is not None
    output = kit.here.output
    if engine.on_this_machine:  # where a generator is at hand already
        return output.missing(jobs)
    numbers = together(jobs)
    work = Work(look, kit, "looked at a mask", kit.folder)
    items = [(mask and mask.file, tuple(asked)) for mask, asked in numbers.items()]
    absent: set[Job] = set()
    refused: list[FibldmError] = []
    for mask, (lacking, sha256, told) in zip(
        numbers, engine.each(work, items, lambda places: track(places, "masks", shown=shown)), strict=True
    ):
        absent |= {Job(mask, number) for number in lacking}
        refused += [] if told is None else [FibldmError(*told)]
        if mask is not None and sha256 is not None:
            mask.expect(sha256)
    if refused:
        raise refusal(refused, len({job.mask for job in absent}))
    output.tell(jobs)
    if absent:
        tell_unmarked(output.synthesizer, output.settings.sampling)
    return [job for job in jobs if job in absent]


def look(desk: Desk, file: Path | None, numbers: Sequence[int]) -> tuple[list[int], str | None, tuple[str, str] | None]:
    """Numbers of a mask's volumes that are missing, the mask's SHA-256, and why it is refused."""
    jobs = desk.jobs([(file, None, number) for number in numbers])
    lacking, error = desk.output.look(jobs)
    mask = jobs[0].mask
    if mask is not None:
        del desk.sources[mask.file]  # its turn to be drawn may come elsewhere
        desk.output.forget(mask)
    told = None if error is None else (error.message, error.remedy)
    return [job.number for job in lacking], None if mask is None or error is not None else mask.sha256, told


def draw(engine: Engine, kit: DeskKit, jobs: Sequence[Job], *, shown: bool) -> list[Rejected]:
    """Make and write volumes, but for those that the checks leave out.

    Batches are those of the jobs in their order, whoever draws them.

    Raises:
        FibldmError: see `Output.attempt`; or the engine gave up.
    """
    assert kit.here is not None
    size, checks = kit.here.output.settings.batch_size, kit.here.output.checks
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    items = [
        (tuple((job.mask and job.mask.file, job.mask and job.mask.sha256, job.number) for job in batch),)
        for batch in batches
    ]
    rejected: list[Rejected] = []
    work = Work(draw_batch, kit, "drew volumes", kit.folder)
    for left_out in engine.each(work, items, lambda places: track(places, "synthesize", shown=shown)):
        for name, findings, by in left_out:
            rejected.append(Rejected(name, findings, [check for check in checks if type(check).__name__ in by]))
    return rejected


def draw_batch(desk: Desk, named: Sequence[Named]) -> list[tuple[str, Sequence[Sequence[str]], list[str]]]:
    """Draw and write some volumes together; name, findings and checks of those that were left out."""
    rejected = desk.output.attempt(desk.jobs(named))
    return [(one.name, one.findings, [type(check).__name__ for check in one.checks]) for one in rejected]
