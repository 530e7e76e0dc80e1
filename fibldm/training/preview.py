"""Pictures of the same cases again and again while a stage trains."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import list_data_collate
from monai.engines import PrepareBatch

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Autoencoder
from fibldm.training.draws import Draw, KeyedDataset, key_seed
from fibldm.training.pictures import Panel, compared, render, write_picture

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

    Raises:
        FibldmError: ``every`` is negative.
    """

    def __init__(
        self, run_dir: str | Path, stage: str, rows: Rows, *, spacing: Sequence[float], every: int, interval: int = 1
    ) -> None:
        if every < 0:
            raise FibldmError(f"preview_every must be at least 0 (no pictures); got {every}")
        self.folder = Path(run_dir) / stage / "previews"
        self.rows, self.spacing, self.epochs = rows, tuple(spacing), every * interval
        self.writer: Any = None

    def attach(self, engine: Engine) -> None:
        if self.epochs:
            engine.add_event_handler(Events.STARTED, self._open)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)
            engine.add_event_handler(Events.COMPLETED, lambda: self.writer.close())

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch % self.epochs and epoch != engine.state.max_epochs:
            return
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            picture = render(self.rows(), self.spacing)
        write_picture(self.folder / f"epoch_{epoch:04d}.png", picture)
        self.writer.add_image("preview", picture, epoch, dataformats="HWC")
        self.writer.flush()

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
        training = self.network.training
        self.network.eval()
        try:
            return [row for index in range(min(self.cases, len(self.dataset))) for row in self._rows(index)]
        finally:
            self.network.train(training)

    def _rows(self, index: int) -> list[list[Panel]]:
        item = self.dataset[Draw(index, 0, key_seed(self.seed, 0, index, 0))]
        volume, _, *masks = self.prepare_batch(list_data_collate([item]), self.device)
        decoded = self.network.decode(self.network.encode(volume).mean, *(masks[0] if masks else ())).clamp(-1, 1)
        return compared(f"case {index + 1}", volume[0].cpu(), decoded[0].float().cpu(), ("input", "reconstruction"))
