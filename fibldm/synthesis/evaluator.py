"""Synthesis as a MONAI engine, for bundles and workflows that want one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from fibldm.synthesis.checking import Rejected
from fibldm.synthesis.mask_source import Job, MaskSource
from fibldm.synthesis.outputs import Output
from fibldm.synthesis.settings import OPTIONS, SamplingSettings, SynthesisSettings
from fibldm.synthesis.synthesizer import Synthesizer


class SynthesisEvaluator(Evaluator):
    """Writes volumes for mask files, a batch an iteration; ``state.output`` has the ``files`` that were written.

    Args:
        synthesizer: makes the volumes.
        dataset: items with ``mask``, the path of a mask or None, and ``number``, which of its volumes.
        output_dir: folder to write to, see `Output`; what lies there already and was made in the same way is kept.
        inferer: how volumes are drawn; None as the synthesizer does by default.
        **options: of `SynthesisSettings` by their names, such as ``covariates`` or ``format``, but for ``count``, which
            is that of the items; all else is of MONAI's ``Evaluator``, such as ``val_handlers``.

    Raises:
        FibldmError: an option has another type or is out of range, masks lack conditions of their own, or a check is
            asked for where no ranges were measured; `run` raises `OutsideRanges` where it left volumes out.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        dataset: Sequence[dict[str, Any]],
        output_dir: str | Path,
        *,
        inferer: SamplingSettings | None = None,
        **options: Any,
    ) -> None:
        asked = {name: options.pop(name) for name in OPTIONS if name in options}
        settings = SynthesisSettings.of(inferer, **asked)
        items, size = list(dataset), settings.batch_size
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        device = torch.device(next(synthesizer.network.parameters()).device)
        super().__init__(device, batches, decollate=False, **options)
        self.output = Output(synthesizer, Path(output_dir), settings)
        files = dict.fromkeys(item["mask"] for item in items)
        settings.check_masks([Path(file) for file in files if file])
        self._masks = {file: MaskSource(Path(file), synthesizer.names) if file else None for file in files}
        # refuse at once what would be refused after the first volumes
        self.add_event_handler(Events.STARTED, lambda: self.output.missing(self._jobs(items)))
        self._rejected: list[Rejected] = []
        self.add_event_handler(Events.COMPLETED, lambda: self.output.conclude(self._jobs(items), self._rejected))

    def _iteration(self, engine: Engine, batchdata: Any) -> dict[str, list[str]]:
        jobs = self._jobs(batchdata)
        self._rejected += self.output.attempt(jobs)
        return {"files": [str(file) for file in map(self.output.path, jobs) if file.exists()]}

    def _jobs(self, items: Sequence[dict[str, Any]]) -> list[Job]:
        return [Job(self._masks[item["mask"]], int(item["number"])) for item in items]


def mask_items(masks: Sequence[Path | None], count: int) -> list[dict[str, Any]]:
    """``count`` volumes of every mask, as items of a dataset; None is no mask."""
    return [{"mask": mask and str(mask), "number": number} for mask in masks for number in range(count)]
