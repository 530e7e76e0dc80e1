"""One stage of a run, from its configuration: skip, resume or begin; train; mark as done."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.metrics import Loss
from monai.bundle import ConfigParser
from torch import nn

from fibldm.errors import FibldmError
from fibldm.models.low_rank import fits
from fibldm.models.tokens import has_tokens
from fibldm.runs import StageFolder, hash_weights
from fibldm.runs.renamed import current
from fibldm.runs.stages import taught
from fibldm.runs.values import check_values, require_minutes
from fibldm.runs.workflow import running_parser
from fibldm.training.adapter import keep_adapter, require_apart, require_base
from fibldm.training.budget import Governed, TimeBudget
from fibldm.training.checkpoints import Checkpoints, GapLimit, Patience, Stop, WallTime
from fibldm.training.distributed import is_first_rank, on_first_rank, parallel, require_joined
from fibldm.training.handlers import UNKNOWN, ClipGradient, Metrics, Schedule, SetEpoch, ShowProgress, TensorBoard
from fibldm.training.initialise import initialise, ready
from fibldm.training.precision import allow_tf32
from fibldm.training.profiler import Profiler
from fibldm.training.step_losses import StepLosses
from fibldm.training.watch import Validation

_logger = logging.getLogger("fibldm")

# Recorded as numbers: a run is read again without the data that they come from.
_COUNTS = ("epochs", "image_channels", "label_channels")
_NAMES = ("teacher",)  # likewise: a later stage must not change which one it was


class Stage:
    """A training stage that stands in a configuration and runs the parts named there.

    It reads these IDs of the configuration:

    * parts: ``network_def``, ``network``, ``ema``, ``optimizer``, ``lr_scheduler``, ``train::sampler``,
      ``train::trainer``, ``validate::evaluator``; ``watch::evaluator``, where there is one and ``watch_training``;
      ``state``, a mapping of whatever else a resume must restore; ``trackers``, a list of more handlers
    * lengths: ``epochs`` or, where given, ``minutes``; ``val_interval``, ``checkpoint_every``, ``keep_every``,
      ``keep_best``, ``limit_val_batches``, ``log_every``, ``patience``, ``stop_gap``, ``wall_time``, ``profile``
    * numbers: ``seed``, ``clip_norm``, ``activation_checkpointing``, ``channels_last``, ``compile``, ``tf32``
    * the beginning: ``init_from``, ``init_strict``, ``init_trust``, ``freeze``, ``lora_rank``, ``lora_weights``,
      ``lora_full``, ``lora_alpha``, ``lora_apart``; ``begin``, where there is one, which is given the network when
      there are neither such weights nor a checkpoint

    Args:
        run_dir: the run folder.
        name: the stage, one of the table of stages (`fibldm.runs.stages`).
        inputs: fingerprints of the data and the stages it builds on.
        restart: begin anew although the folder holds another configuration's stage.
        began: when the command began, in seconds of `time.monotonic`, where there are ``minutes``; None is now.
        check: refuses what must not be trained on, before anything is written; None has nothing to say.
    """

    least_epochs = 1

    def __init__(
        self,
        run_dir: str,
        name: str,
        *,
        inputs: dict[str, str],
        restart: bool = False,
        began: float | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.folder = StageFolder(Path(run_dir), name)
        self.inputs, self.restart = inputs, restart
        self.began, self.check = time.monotonic() if began is None else began, check

    def run(self) -> None:
        """Train the stage until it is done or its wall time is over, or say that it is done.

        Raises:
            FibldmError: the folder holds a stage of another configuration, another process trains it, an option cannot
                be followed, the loss is not finite, or a checkpoint cannot be written.
        """
        require_joined()
        with ExitStack() as locks:
            on_first_rank(lambda: locks.enter_context(self.folder.alone()))
            self._run()

    def _run(self) -> None:
        parser = running_parser(self)
        config = current(parser.get())
        if config != parser.get():  # a configuration of an earlier version, such as a bundle's
            parser = ConfigParser(config)
        check_values(config)  # MONAI's own command does not
        config = {**config, **{key: int(parser.get_parsed_content(key)) for key in _COUNTS if key in config}}
        config |= {key: str(parser.get_parsed_content(key)) for key in _NAMES if key in config}
        config["minutes"] = _minutes(parser)
        if config["epochs"] < self.least_epochs:
            raise FibldmError(
                f"a stage that is trained needs at least {self.least_epochs} epoch; epochs is {config['epochs']}",
                "give more; an autoencoder that is to stay as it is takes --config autoencoder_as_given",
            )
        if self.check is not None and (self.restart or self.folder.done() is None):
            on_first_rank(self.check)
        with self.folder.kept_until_begun(self.restart and is_first_rank()):
            state = on_first_rank(lambda: self.folder.begin(config, self.inputs, restart=self.restart))
            if state == "done":
                _logger.info("%s: done already (%s), nothing to train", self.folder.name, self.folder.path)
                return
            with _log_to(self.folder.path / "log.txt"):
                self._train(parser)

    def _train(self, parser: ConfigParser) -> None:
        budget = TimeBudget(self.folder, _minutes(parser), began=self.began)
        with budget.counted():
            self._train_within(budget, parser)

    def _train_within(self, budget: TimeBudget, parser: ConfigParser) -> None:
        torch.manual_seed(int(parser["seed"]))
        get = parser.get_parsed_content
        self._ready(get("network_def"), parser)  # before the optimizer asks which weights are trained
        trainer, ema, optimizer = get("train::trainer"), get("ema"), get("optimizer")
        trainer.network = parallel(trainer.network)
        metrics = Metrics(self.folder.path / "metrics.csv", optimizer)
        objects = {"network": get("network_def"), "ema": ema.ema_model, "optimizer": optimizer, **get("state")}
        checkpoints = Checkpoints(
            self.folder.checkpoints,
            objects,
            ema=ema,
            every=int(get("checkpoint_every")),
            metrics=metrics,
            keep_every=int(get("keep_every")),
            keep_best=_later(parser, "keep_best", 0),
            optional={"budget": budget},
        )
        schedule, interval = Schedule(get("lr_scheduler")), int(get("val_interval"))
        patience = Patience(checkpoints, patience=int(get("patience")), interval=interval)
        gap_limit = GapLimit(checkpoints, metrics, limit=get("stop_gap"), patience=patience.patience)
        wall_time = WallTime(checkpoints, get("wall_time"))
        batches = _later(parser, "limit_val_batches", None)
        watched = _watched(parser)
        validation = Validation(
            get("validate::evaluator"), metrics, interval=interval, training=watched, batches=batches
        )
        steps = StepLosses(self.folder.path, _later(parser, "log_every", 0))
        trackers = get("trackers") if is_first_rank() else []
        SetEpoch(get("train::sampler"), int(get("seed"))).attach(trainer)
        budget.govern(
            trainer, Governed(get("train::sampler"), schedule, validation, checkpoints, (patience, *trackers))
        )
        clip = ClipGradient(get("network"), float(get("clip_norm")))
        for handler in (clip, ema, schedule, validation, metrics, steps):
            handler.attach(trainer)
        if is_first_rank():
            profilers = [Profiler(self.folder.path, get("profile"))] if "profile" in parser and get("profile") else []
            for handler in (TensorBoard(metrics), ShowProgress(self.folder.name, metrics), *profilers, *trackers):
                handler.attach(trainer)
        for handler in (checkpoints, patience, gap_limit, wall_time):
            handler.attach(trainer)
        self._go_on(trainer, checkpoints, budget, (patience, gap_limit))
        apart = bool(_later(parser, "lora_apart", False))
        keep = partial(keep_adapter, self.folder, parser, ema.ema_model) if apart else None
        self._end(trainer, wall_time, budget, patience, gap_limit, keep)

    def _ready(self, network: nn.Module, parser: ConfigParser) -> None:
        get = parser.get_parsed_content
        allow_tf32(bool(get("tf32")))
        if apart := _later(parser, "lora_apart", False):
            require_apart(self.folder.name, get, tokens=has_tokens(network))
        begun = bool(get("init_from")) or taught(self.folder.name)  # a student has its teacher's weights
        if (apart or get("lora_rank")) and not begun:
            raise FibldmError("lora_rank adapts weights that are there; init_from names none", "give init_from")
        if get("init_from") and not (self.folder.checkpoints / "last.pt").exists():
            trust = bool(_later(parser, "init_trust", False))
            strict, stage = bool(get("init_strict")), self.folder.name
            report = initialise(network, get("init_from"), strict=strict, stage=stage, trust=trust)
            new = [*report.missing, *(name for name, *_ in report.other_shapes)]
            if apart:
                require_base(get("init_from"), new, tokens=has_tokens(network))
            elif get("lora_rank") and (still := [name for name in new if not fits(name, get("lora_full"))]):
                raise FibldmError(
                    f"weights that {get('init_from')} does not have must be trained in full; {', '.join(still[:5])} "
                    "would stay as they were drawn",
                    "name them in lora_full",
                )
        elif "begin" in parser and get("begin") is not None and not (self.folder.checkpoints / "last.pt").exists():
            get("begin")(network)
        for said in ready(network, lambda key: _later(parser, key, None)):
            _logger.info("%s: %s", self.folder.name, said)
        if backend := get("compile"):
            network.compile(backend="inductor" if backend is True else str(backend))

    def _go_on(self, trainer: Any, checkpoints: Checkpoints, budget: TimeBudget, stops: Sequence[Stop]) -> None:
        epoch = checkpoints.resume(trainer)
        budget.go_on()
        if epoch:
            _logger.info("%s: going on after epoch %d%s", self.folder.name, epoch, _of(trainer.state.max_epochs))
        if epoch < trainer.state.max_epochs and not any(stop.is_over(epoch) for stop in stops):
            trainer.run()

    def _end(
        self,
        trainer: Any,
        wall_time: WallTime,
        budget: TimeBudget,
        patience: Patience,
        gap_limit: GapLimit,
        keep: Callable[[dict[str, Any]], dict[str, str]] | None,
    ) -> None:
        epoch, epochs = trainer.state.epoch, trainer.state.max_epochs
        if wall_time.is_over:
            _logger.info(
                "%s: stopped after epoch %d%s, as the next one may end after the wall time of %g s; "
                "run the same command again to go on",
                *(self.folder.name, epoch, _of(epochs), wall_time.limit),
            )
            return
        if epoch < epochs:
            reason = (gap_limit if gap_limit.is_over(epoch) else patience).reason
            _logger.info("%s: stopped after epoch %d of %d, as %s", self.folder.name, epoch, epochs, reason)
        if is_first_rank():
            best, gaps = self.folder.weights(), gap_limit.gaps(epoch)
            weights = hash_weights(best["model"])
            kept = keep(best) if keep is not None else {}  # before the stage is done
            self.folder.finish(
                epochs=epochs,
                stopped_epoch=epoch,
                best_epoch=best["epoch"],
                validation_loss=best["loss"],
                **({"gap": {"best": gaps.get(best["epoch"]), "last": [*gaps.values()][-1]}} if gaps else {}),
                weights=weights,
                **kept,
                **budget.facts(),
            )
            budget.say_end()


def validation_loss(loss: torch.nn.Module) -> Loss:
    """The loss over the validation cases, each batch weighing as many cases as it holds."""

    def pair(output: dict[str, Any]) -> tuple[Any, Any]:
        return output["pred"], output["label"]

    return Loss(loss, output_transform=pair, batch_size=lambda target: len(target.value))


def _watched(parser: ConfigParser) -> Any:
    """The evaluator of the training patients that are watched, or None."""
    if "watch" not in parser:
        return None
    if parser.get_parsed_content("watch_training"):
        return parser.get_parsed_content("watch::evaluator")
    if parser.get_parsed_content("stop_gap") is not None:
        raise FibldmError(
            "stop_gap needs the loss on training patients; watch_training is false",
            "set watch_training to true, or stop_gap to null",
        )
    return None


def _later(parser: ConfigParser, key: str, before: Any) -> Any:
    """A key that configurations of an earlier version, such as those of bundles, do not have."""
    return parser.get_parsed_content(key) if key in parser else before


def _of(epochs: int) -> str:
    return "" if epochs == UNKNOWN else f" of {epochs}"


def _minutes(parser: ConfigParser) -> float | None:
    value = parser.get_parsed_content("minutes") if "minutes" in parser else None
    require_minutes(value)
    return value


@contextmanager
def _log_to(file: Path) -> Iterator[None]:
    """What is said inside goes to a file as well, on the first rank."""
    if not is_first_rank():
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        handler.close()
