"""Synthesis as a MONAI engine, for bundles and workflows that want one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from fibldm.synthesis.outputs import Job, Output
from fibldm.synthesis.settings import SamplingSettings
from fibldm.synthesis.synthesizer import Synthesizer


class SynthesisEvaluator(Evaluator):
    """Writes volumes for mask files, a batch an iteration; ``state.output`` has the ``files`` that were written.

    Args:
        synthesizer: makes the volumes.
        dataset: items with ``mask``, the path of a mask or None, and ``number``, which of its volumes.
        output_dir: folder to write to, see `Output`; what lies there already and was made in the same way is kept.
        inferer: how volumes are drawn; None as the synthesizer does by default.
        batch_size: volumes that are sampled together.
        allow_extrapolation: go on where a mask lies outside what the training data covered.
        covariates: what is asked of the patients beside the masks, by name; all else is unknown.
        **options: of MONAI's ``Evaluator``, such as ``val_handlers``.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        dataset: Sequence[dict[str, Any]],
        output_dir: str | Path,
        *,
        inferer: SamplingSettings | None = None,
        batch_size: int = 1,
        allow_extrapolation: bool = False,
        covariates: Mapping[str, object] | None = None,
        **options: Any,
    ) -> None:
        items = list(dataset)
        batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        device = torch.device(next(synthesizer.network.parameters()).device)
        super().__init__(device, batches, decollate=False, **options)
        settings = inferer or synthesizer.sampling
        self.output = Output(synthesizer, Path(output_dir), settings, allow_extrapolation, covariates=covariates or {})
        # refuse at once what would be refused after the first volumes
        self.add_event_handler(Events.STARTED, lambda: self.output.missing(_jobs(items)))

    def _iteration(self, engine: Engine, batchdata: Any) -> dict[str, list[str]]:
        return {"files": [str(file) for file in self.output.write(_jobs(batchdata))]}


def _jobs(items: Sequence[dict[str, Any]]) -> list[Job]:
    return [(item["mask"] and Path(item["mask"]), int(item["number"])) for item in items]


def mask_items(masks: Sequence[Path | None], count: int) -> list[dict[str, Any]]:
    """``count`` volumes of every mask, as items of a dataset; None is no mask."""
    return [{"mask": mask and str(mask), "number": number} for mask in masks for number in range(count)]
