"""How long a stage would take on this machine: a few real steps of it, on tensors of the right shapes."""

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import list_data_collate

from fibldm.models.conditions.condition import Case, present
from fibldm.planning.traced_step import Request, engines, first_items, imagine_earlier, stage_parser, validate
from fibldm.runs.causes import unwrapped
from fibldm.runs.stages import kind_of
from fibldm.training.draws import Draw
from fibldm.training.handlers import ClipGradient

_ENDLESS = 10**9  # iterations of the epoch that is begun
_REPEATS, _SECONDS = 6, 8.0  # whichever comes first
_SLOW = 2  # steps


@dataclass(frozen=True)
class StageTime:
    """What a stage of training takes, by the speed of this machine.

    Attributes:
        epochs: of the configuration.
        steps: of the optimizer in an epoch.
        seconds_per_step: with the loading of its batches.
        validations: how many.
        seconds_per_validation: that of training patients included.
        checkpoint: seconds at the end of an epoch.
        loading: seconds until all cases are in memory.
    """

    epochs: int
    steps: int
    seconds_per_step: float
    validations: int
    seconds_per_validation: float
    checkpoint: float
    loading: float

    @property
    def seconds(self) -> float:
        """Of all of the stage."""
        epoch = self.steps * self.seconds_per_step + self.checkpoint
        return self.loading + self.epochs * epoch + self.validations * self.seconds_per_validation

    @property
    def minutes(self) -> float:
        """Of all of the stage."""
        return self.seconds / 60


def time_stage(stage: str, request: Request) -> StageTime:
    """What a stage takes on a device that is there; its first steps are done, on the first case or an empty latent.

    Raises:
        FibldmError: the configuration or the data are refused.
    """
    with unwrapped():
        counts = count(stage, request)
        parser = stage_parser(stage, request, with_values=True)
        began = time.monotonic()
        items = first_items(stage, parser, request)
        loading = (time.monotonic() - began) / len(items)
        get = parser.get_parsed_content
        trainer, evaluator = engines(parser)
        step = _time_steps(parser, trainer, items["train"], stage)
        batch = list_data_collate([items["validate"]] * int(get("validate::dataloader::batch_size")))
        prepared = evaluator.prepare_batch(batch, get("device"))
        validation = _mean_of(lambda: _finish(validate(evaluator, prepared, trainer.loss_function), get("device")))
        epochs = int(get("epochs"))
        return StageTime(
            epochs=epochs,
            steps=counts["steps"],
            seconds_per_step=step,
            validations=math.ceil(epochs / int(get("val_interval"))),
            seconds_per_validation=validation * counts["validation_batches"],
            checkpoint=_time_checkpoint(parser) / int(get("checkpoint_every")),
            loading=counts["cases"] * (_time_conditions(parser) if kind_of(stage).on_latents else loading),
        )


@unwrapped()
def encoding_seconds(autoencoder: ConfigParser, latents: ConfigParser) -> float:
    """What the stage between 1 and 2 takes here, by the parts of its first case.

    Args:
        autoencoder: configuration of stage 1; its network need not be trained.
        latents: configuration of the stage.

    Raises:
        FibldmError: a part of one is refused.
    """
    stage = latents.get_parsed_content("stage")
    seconds: float = stage.expected_seconds(autoencoder.get_parsed_content("network_def"))
    return seconds


def time_encoding(request: Request) -> float:
    """Seconds of the latents, see `encoding_seconds`.

    Raises:
        FibldmError: the configuration or the data are refused.
    """
    parsers = (stage_parser(stage, request, with_values=True) for stage in ("autoencoder", "latents"))
    return encoding_seconds(*parsers)


@unwrapped()
def count(stage: str, request: Request) -> dict[str, int]:
    """Draws and steps of an epoch, batches of a validation, and cases in memory; nothing is loaded.

    Raises:
        FibldmError: the configuration or the data are refused.
    """
    parser = stage_parser(stage, request, with_values=True)
    imagine_earlier(stage, parser, request)
    get = parser.get_parsed_content
    watched = ["watch"] if "watch" in parser and get("watch_training") else []
    cases = {part: len(get(f"{part}::dataset::data")) for part in ("train", "validate", *watched)}
    draws = cases["train"] * _views(parser, "train::sampler")
    batches = math.ceil(draws / int(get("train::dataloader::batch_size")))
    validation = 0
    for part in ("validate", *watched):
        drawn = cases[part] * _views(parser, "validate::dataloader::sampler")
        validation += math.ceil(drawn / int(get("validate::dataloader::batch_size")))
    steps = math.ceil(batches / int(get("accumulation_steps")))
    return {"draws": draws, "steps": steps, "validation_batches": validation, "cases": sum(cases.values())}


def _views(parser: ConfigParser, sampler: str) -> int:
    return int(parser.get_parsed_content(f"{sampler}::views")) if f"{sampler}::views" in parser else 1


def _time_steps(parser: ConfigParser, trainer: Any, item: Mapping[str, Any], stage: str) -> float:
    """Seconds of a step of the optimizer, with all that is done after an iteration."""
    get = parser.get_parsed_content
    for handler in (ClipGradient(get("network"), float(get("clip_norm"))), get("ema")):
        handler.attach(trainer)
    trainer.state.epoch_length = _ENDLESS
    dataset = None if kind_of(stage).on_latents else get("train::dataset")
    size, workers = int(get("batch_size")), int(get("num_workers"))
    loading: list[float] = []

    def draw() -> Any:
        began, seed = time.monotonic(), trainer.state.iteration * size
        items = [item if dataset is None else dataset[Draw(0, 0, seed + number)] for number in range(size)]
        batch = list_data_collate(items)
        loading.append(time.monotonic() - began)
        return batch

    def step() -> None:
        for _ in range(int(get("accumulation_steps"))):
            trainer.state.batch = draw()
            trainer.state.iteration += 1
            trainer.state.output = trainer._iteration(trainer, trainer.state.batch)
            trainer.fire_event(Events.ITERATION_COMPLETED)
        _finish(trainer.state.output[0]["loss"], get("device"))

    seconds = _mean_of(step)
    if not workers:
        return seconds
    drawing = sum(loading) / len(loading) * int(get("accumulation_steps"))
    return max(seconds - drawing, drawing / workers)


def _finish(value: Any, device: Any) -> None:
    """Wait until the device has done it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _time_checkpoint(parser: ConfigParser) -> float:
    get = parser.get_parsed_content
    parts = (get("network_def"), get("ema").ema_model, get("optimizer"))
    began = time.monotonic()
    torch.save([part.state_dict() for part in parts], io.BytesIO())
    return time.monotonic() - began


def _time_conditions(parser: ConfigParser) -> float:
    """Seconds of encoding the conditions of a latent, which is most of what its loading takes."""
    conditions, size = present(parser.get_parsed_content("conditions")), parser["latents"].facts["grid"]["size"]
    case = Case(torch.zeros(1, *size, dtype=torch.uint8), {})
    began = time.monotonic()
    for condition in conditions.values():
        condition.encode_case(case)
    return time.monotonic() - began


def _mean_of(function: Callable[[], None]) -> float:
    """Seconds of a call, after some that are slower, unless it takes too long for more than one."""
    taken: list[float] = []
    while len(taken) < _SLOW + _REPEATS and sum(taken) < _SECONDS:
        began = time.monotonic()
        function()
        taken.append(time.monotonic() - began)
    counted = taken[_SLOW:] or taken[-1:]
    return sum(counted) / len(counted)
