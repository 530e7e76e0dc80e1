"""Pictures of the same cases again and again while a stage trains."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import list_data_collate
from monai.engines import PrepareBatch
from safetensors.torch import load_file
from torch import Tensor, nn

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import hash_value, write_text
from fibldm.models import samplers
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.denoiser import Denoiser
from fibldm.models.network import ConditionedNetwork
from fibldm.models.tiling import tiled_decode
from fibldm.models.timesteps import sampling_times
from fibldm.runs import StageFolder
from fibldm.training.draws import Draw, KeyedDataset, key_seed
from fibldm.training.latents import Latents
from fibldm.training.prepare_batch import LatentPrepareBatch
from fibldm.volumes.pictures import Panel, compared, planes_of, preview_file, render, write_picture

Rows = Callable[[], Sequence[Sequence[Panel]]]


class Preview:
    """Draws into ``RUN/<stage>/previews``: ``epoch_0010.png``, and the same as an image of TensorBoard.

    What is drawn is up to the stage. Drawing leaves the random numbers of training as they are, so a run with pictures
    ends with the same weights as one without.

    Args:
        run_dir: the run folder.
        stage: name of the stage.
        rows: makes the rows of the picture, such as `ReconstructionRows`.
        spacing: mm along R, A, S.
        every: validations from one picture to the next; 0 draws none. The last validation is drawn in any case.
        interval: epochs from one validation to the next.
        measure: figures by name that go beside every picture, such as `SampleRows.measure`, into
            ``RUN/<stage>/previews/metrics.csv`` and TensorBoard; None measures nothing.

    Attributes:
        early: the first validation is drawn, too.

    Raises:
        FibldmError: ``every`` is negative.
    """

    def __init__(
        self,
        run_dir: str | Path,
        stage: str,
        rows: Rows,
        *,
        spacing: Sequence[float],
        every: int,
        interval: int = 1,
        measure: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        if every < 0:
            raise FibldmError(f"preview_every must be at least 0 (no pictures); got {every}")
        self.folder = Path(run_dir) / stage / "previews"
        self.rows, self.spacing, self.every, self.interval = rows, tuple(spacing), every, interval
        self.measure = measure
        self.early = False
        self.writer: Any = None

    def attach(self, engine: Engine) -> None:
        if self.every:
            engine.add_event_handler(Events.STARTED, self._open)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)
            engine.add_event_handler(Events.COMPLETED, lambda: self.writer.close())

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        is_due = epoch % (self.every * self.interval) == 0 or epoch == engine.state.max_epochs
        if not is_due and not (self.early and epoch % self.interval == 0):
            return
        self.early = False
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            picture = render(self.rows(), self.spacing)
            figures = self.measure() if self.measure is not None else {}
        write_picture(preview_file(self.folder.parent, epoch), picture)
        self.writer.add_image("preview", picture, epoch, dataformats="HWC")
        if figures:
            self._write(figures, epoch)
        self.writer.flush()

    def _write(self, figures: Mapping[str, float], epoch: int) -> None:
        """The row of an epoch, in place of those that are done again."""
        file = self.folder / "metrics.csv"
        before = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
        rows = [row for row in before if int(row["epoch"]) < epoch]
        rows.append({"epoch": str(epoch), **{name: f"{value:.6g}" for name, value in figures.items()}})
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [",".join(names), *(",".join(row.get(name, "") for name in names) for row in rows)]
        write_text(file, "\n".join(lines) + "\n")
        for name, value in figures.items():
            self.writer.add_scalar(name, value, epoch)

    def _open(self, engine: Engine) -> None:
        # imported here, since it takes a second that only training has
        from torch.utils.tensorboard import SummaryWriter

        # a folder of its own: TensorBoard reads the files of a folder one after the other, not side by side
        self.writer = SummaryWriter(str(self.folder), purge_step=engine.state.epoch + 1)


class ReconstructionRows:
    """Stage 1: fixed validation cases, what the autoencoder makes of them, and the difference.

    Args:
        network: the averaged autoencoder; in evaluation mode while it draws.
        dataset: of validation; its first cases are drawn as validation sees them.
        prepare_batch: what validation hands to the network: a volume, and the mask if it needs one.
        cases: how many.
        seed: of the run.
        device: where the network is.
    """

    def __init__(
        self,
        network: Autoencoder,
        dataset: KeyedDataset,
        *,
        prepare_batch: PrepareBatch,
        cases: int = 2,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.network, self.dataset, self.prepare_batch = network, dataset, prepare_batch
        self.cases, self.seed, self.device = cases, seed, device

    @torch.no_grad()
    def __call__(self) -> list[list[Panel]]:
        with _evaluating(self.network):
            return [row for index in range(min(self.cases, len(self.dataset))) for row in self._rows(index)]

    def _rows(self, index: int) -> list[list[Panel]]:
        item = self.dataset[Draw(index, 0, key_seed(self.seed, 0, index, 0))]
        volume, _, *masks = self.prepare_batch(list_data_collate([item]), self.device)
        decoded = self.network.decode(self.network.encode(volume).mean, *(masks[0] if masks else ())).clamp(-1, 1)
        return compared(f"case {index + 1}", volume[0].cpu(), decoded[0].float().cpu(), ("input", "reconstruction"))


class SampleRows:
    """Stages 2 and 3: what the network samples now, decoded; beside the mask and the real volume where it sees a mask.

    The noise of a sample has a seed of its own, keyed by (seed, case, number), so that only the network changes from
    one picture to the next.

    Args:
        network: the averaged network; in evaluation mode while it draws.
        latents: of the run; the first validation cases are drawn, decoded by the first stage of the run.
        prepare_batch: of validation, which knows the process, the target and the conditions.
        cases: how many.
        measured: how many are measured by `measure`.
        figures: of samples, real volumes and labels, such as `fibldm.evaluation.preview_figures.PreviewFigures`.
        samples: of each case.
        sampler: one of `fibldm.models.samplers.SAMPLERS`.
        steps: of the sampler.
        eta: of the sampler "ddim", in [0, 1]; None is its own.
        shift: of the sampling times, see `sampling_times`.
        seed: of the run.
        device: where the network is.

    Raises:
        FibldmError: there is no such sampler, steps or shift are out of range, or eta is not for the sampler.
    """

    def __init__(
        self,
        network: ConditionedNetwork,
        latents: Latents,
        *,
        prepare_batch: LatentPrepareBatch,
        cases: int = 2,
        measured: int = 0,
        figures: Callable[..., dict[str, float]] | None = None,
        samples: int = 1,
        sampler: str = "dpmpp_2m",
        steps: int = 10,
        eta: float | None = None,
        shift: float = 1.0,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.network, self.latents, self.prepare_batch = network, latents, prepare_batch
        self.cases, self.samples, self.seed, self.device = cases, samples, seed, device
        self.measured, self.figures = measured, figures
        self.draw = samplers.sampler(sampler, eta)
        self.times = sampling_times(steps, spacing=prepare_batch.process.sampling_spacing, shift=shift)

    @torch.no_grad()
    def __call__(self) -> list[list[Panel]]:
        items = self.latents.items("validation")[: self.cases]
        with _evaluating(self.network):
            return [row for number, item in enumerate(items, start=1) for row in self._rows(f"case {number}", item)]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Figures of the first sample of every measured case, beside its real volume as the first stage shows it.

        Raises:
            FibldmError: a volume is too small to be measured.
        """
        if self.figures is None:
            return {}
        with _evaluating(self.network):
            measured = [self._pair(item) for item in self.latents.items("validation")[: self.measured]]
        made, real, labels = zip(*measured, strict=True)
        follows = self.prepare_batch.mask is not None
        return {"cases": len(measured), **self.figures(made, real, labels, follows_masks=follows)}

    def _pair(self, item: Mapping[str, str]) -> tuple[Any, Any, Any]:
        """Sample, real volume and labels as arrays."""
        cached = load_file(item["file"])
        labels, real = cached["labels"][None].long(), cached["mean"][None]
        z = self._sample(item["case"], 0, cached, real.shape[1:])
        volumes = (self._decode(self.latents.space.denormalise(z), labels), self._decode(real, labels))
        made, shown = (volume.float().cpu().numpy() for volume in volumes)
        return made, shown, cached["labels"][0].numpy()

    def _rows(self, title: str, item: Mapping[str, str]) -> list[list[Panel]]:
        cached = load_file(item["file"])
        labels, real = cached["labels"][None].long(), cached["mean"][None]
        shown = {} if self.prepare_batch.mask is None else {"real": self._decode(real, labels)}
        for number in range(self.samples):
            z = self._sample(item["case"], number, cached, real.shape[1:])
            shown[f"sample {number + 1}"] = self._decode(self.latents.space.denormalise(z), labels)
        rows = []
        for channel in range(len(shown["sample 1"])):
            drawn = {name: volume[channel] for name, volume in shown.items()}
            if self.prepare_batch.mask is not None:
                drawn = {"mask": _gray(labels[0, 0], self._labels), **drawn}
            rows.append([panel for name, volume in drawn.items() for panel in _panels(f"{title}\n{name}", volume)])
        return rows

    def _sample(self, case: str, number: int, cached: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(int(hash_value((self.seed, case, number))[:15], 16))
        prepare, process = self.prepare_batch, self.prepare_batch.process
        known = self.latents.case(case, {**cached, "labels": cached["labels"].long()})
        shown = {name: part.encode_case(known)[None].to(self.device) for name, part in prepare.conditions.items()}
        denoise = Denoiser(self.network, process, prepare.target, shown)
        noise = samplers.draw_noise(shape, [generator]).to(self.device)
        return self.draw(denoise, noise, self.times, process=process, generators=[generator])

    def _decode(self, latent: Tensor, labels: Tensor) -> Tensor:
        """The volume ``(C, X, Y, Z)`` of a latent ``(1, c, x, y, z)`` in the first stage's own scale."""
        mask = MaskEncoding(self._labels, 1).encode(labels).to(self.device) if self._first_stage.needs_mask else None
        return tiled_decode(self._first_stage, latent.to(self.device), mask=mask)[0].clamp(-1, 1)

    @property
    def _labels(self) -> tuple[int, ...]:
        return tuple(int(label) for label in self.latents.facts["labels"])

    @cached_property
    def _first_stage(self) -> FrozenFirstStage:
        trained = StageFolder(self.latents.run_dir, "autoencoder").trained()
        return FrozenFirstStage(trained).to(self.device)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _gray(labels: Tensor, values: Sequence[int]) -> Tensor:
    """Labels ``(X, Y, Z)`` as grays of [-1, 1], evenly in the order of their values; unknown is white."""
    known = torch.tensor([*sorted(values), UNKNOWN_LABEL])
    return torch.linspace(-1, 1, len(known))[torch.searchsorted(known, labels)]


def _panels(title: str, volume: Tensor) -> list[Panel]:
    """All planes of a volume ``(X, Y, Z)``; a single slice only has the axial one."""
    return [Panel(title, volume, plane) for plane in planes_of(volume)]
