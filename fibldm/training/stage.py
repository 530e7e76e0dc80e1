"""One stage of a run, from its configuration: skip, resume or begin; train; mark as done."""

import inspect
import logging
import math
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Loss
from monai.bundle import ConfigParser
from torch.optim.lr_scheduler import LambdaLR

from fibldm.errors import FibldmError
from fibldm.runs import StageFolder, hash_weights
from fibldm.training.handlers import Checkpoints, ClipGradient, Metrics, SetEpoch, ShowProgress, TensorBoard

_logger = logging.getLogger("fibldm")

# Recorded as numbers: a run is read again without the data that they come from.
_COUNTS = ("epochs", "image_channels")


class Stage:
    """A training stage that stands in a configuration and runs the parts named there.

    It reads these IDs of the configuration: ``network_def``, ``ema``, ``optimizer``, ``lr_scheduler``,
    ``train::sampler``, ``train::trainer``, ``validate::evaluator``, ``epochs``, ``seed``, ``checkpoint_every``,
    ``clip_norm``, ``val_interval``.

    Args:
        run_dir: the run folder.
        name: the stage, one of `fibldm.runs.STAGES`.
        inputs: fingerprints of the data and the stages it builds on.
        restart: begin anew although the folder holds another configuration's stage.
    """

    def __init__(self, run_dir: str, name: str, *, inputs: dict[str, str], restart: bool = False) -> None:
        self.folder = StageFolder(Path(run_dir), name)
        self.inputs, self.restart = inputs, restart

    def run(self) -> None:
        """Train the stage, or say that it is done.

        Raises:
            FibldmError: the folder holds a stage of another configuration, or the loss is not finite.
        """
        parser = running_parser()
        config = parser.get()
        config = {**config, **{key: int(parser.get_parsed_content(key)) for key in _COUNTS if key in config}}
        state = self.folder.begin(config, self.inputs, restart=self.restart)
        if state == "done":
            _logger.info("%s: done already (%s), nothing to train", self.folder.name, self.folder.path)
            return
        log = _log_to(self.folder.path / "log.txt")
        try:
            self._train(parser)
        finally:
            _logger.removeHandler(log)
            log.close()

    def _train(self, parser: ConfigParser) -> None:
        torch.manual_seed(int(parser["seed"]))
        get = parser.get_parsed_content
        network, trainer, ema = get("network_def"), get("train::trainer"), get("ema")
        optimizer, scheduler = get("optimizer"), get("lr_scheduler")
        metrics = Metrics(self.folder.path / "metrics.csv", optimizer)
        objects = {"network": network, "ema": ema.ema_model, "optimizer": optimizer}
        checkpoints = Checkpoints(
            self.folder.checkpoints, objects, ema=ema, every=int(get("checkpoint_every")), metrics=metrics
        )
        SetEpoch(get("train::sampler"), int(get("seed"))).attach(trainer)
        if get("clip_norm"):
            ClipGradient(network, float(get("clip_norm"))).attach(trainer)
        ema.attach(trainer)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
        _validate(trainer, get("validate::evaluator"), int(get("val_interval")), metrics)
        for handler in (metrics, TensorBoard(metrics), checkpoints, ShowProgress(self.folder.name, metrics)):
            handler.attach(trainer)
        self._go_on(trainer, checkpoints, scheduler)
        best = self.folder.weights()
        self.folder.finish(
            epochs=trainer.state.max_epochs,
            best_epoch=best["epoch"],
            validation_loss=best["loss"],
            weights=hash_weights(best["model"]),
        )

    def _go_on(self, trainer: Any, checkpoints: Checkpoints, scheduler: Any) -> None:
        epoch = checkpoints.resume(trainer)
        if epoch:
            place_schedule(scheduler, trainer.state.iteration)
            _logger.info("%s: going on after epoch %d of %d", self.folder.name, epoch, trainer.state.max_epochs)
        if epoch < trainer.state.max_epochs:
            trainer.run()


def place_schedule(scheduler: LambdaLR, iteration: int) -> None:
    """Put a schedule that is a closed form of the iteration where it was after ``iteration`` steps.

    The rate of the next step comes from the schedule and not from the checkpoint, as more epochs make it another one.
    """
    scheduler.last_epoch = iteration
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate


def running_parser() -> ConfigParser:
    """The parser of the configuration whose expression is being evaluated.

    MONAI hands an expression the objects it names, but not the configuration it stands in; a run folder must record
    exactly that, overrides included, so the parser is taken from the call stack.

    Raises:
        RuntimeError: called from anywhere but a configuration.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            return owner
        frame = frame.f_back
    raise RuntimeError("running_parser() must be called from an expression of a MONAI configuration")


def validation_loss(loss: torch.nn.Module) -> Loss:
    """The loss over the validation cases, each batch weighing as many cases as it holds."""

    def pair(output: dict[str, Any]) -> tuple[Any, Any]:
        return output["pred"], output["label"]

    return Loss(loss, output_transform=pair, batch_size=lambda target: len(target.value))


def _validate(trainer: Engine, evaluator: Any, interval: int, metrics: Metrics) -> None:
    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: Engine) -> None:
        if engine.state.epoch % interval == 0 or engine.state.epoch == engine.state.max_epochs:
            evaluator.run(engine.state.epoch)
            loss = float(evaluator.state.metrics["validation_loss"])
            if not math.isfinite(loss):
                raise FibldmError(
                    f"the validation loss must stay finite; it is {loss} in epoch {engine.state.epoch}",
                    "lower learning_rate or clip_norm; the last checkpoint is as it was",
                )
            metrics.validation_loss = loss


def _log_to(file: Path) -> logging.Handler:
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    return handler
