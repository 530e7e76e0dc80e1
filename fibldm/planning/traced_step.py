"""A stage as its configuration describes it, traced for its memory: nothing is trained and nothing is written.

The stage is built as training builds it, and goes through two steps of the optimizer and a validation on tensors
without values (`fibldm.planning.live_bytes`).
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import list_data_collate
from monai.engines.utils import IterationEvents
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fibldm import UNKNOWN_LABEL
from fibldm.models.conditions.condition import Condition, present
from fibldm.planning.live_bytes import LiveBytes, forget_values, held_on_cpu, held_on_cuda, without_values
from fibldm.runs.causes import unwrapped
from fibldm.runs.config_files import ConfigFiles, shipped
from fibldm.runs.configuration import stage_configuration
from fibldm.runs.stages import files_of_stages, kind_of
from fibldm.training.draws import Draw
from fibldm.training.encode_stage import about_second_images, covariates_by_case
from fibldm.training.initialise import ready
from fibldm.training.latents import Latents
from fibldm.volumes.datalist import load_datalist, read_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import ModelGrid, resample

_RUN = Path("plan")  # a run that is never made
_SPLITS = ("training", "validation")
_STEPS = 2
_MOVED = re.compile(r"\$(@\w+)\.to\(.*\)")


@dataclass(frozen=True)
class Request:
    """What is planned.

    Attributes:
        work: folder of ``fibldm prepare``.
        configs: paths or names, as of ``fibldm train --config``.
        overrides: ``key::sub`` to value, each for the stages that have the key.
        device: "cpu" or "cuda". Where there is no CUDA device, one is imitated on the CPU: bfloat16 unless float32 is
            asked for, with float32 in the norms, as CUDA's autocast has it.
        stage_configs: more configurations of single stages, by their names.
    """

    work: Path
    configs: tuple[str, ...]
    overrides: Mapping[str, Any]
    device: str
    stage_configs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def changed(self, **overrides: Any) -> "Request":
        """The same with other settings."""
        return replace(self, overrides={**self.overrides, **overrides})

    @property
    def imitated(self) -> bool:
        return self.device == "cuda" and not torch.cuda.is_available()


@dataclass(frozen=True)
class StageMemory:
    """The memory of a stage.

    Attributes:
        stage: of training.
        batch_size: of training.
        size: of an input of the network in training: of a patch in voxels, or of a latent in cells.
        grid: size of the model grid in voxels.
        parameters: how many the network has.
        resident: bytes before the first step: the network and its average.
        step: most bytes that a training step adds: gradients, optimizer, activations, batch.
        validation: most bytes that the validation adds, to all that a step leaves behind.
    """

    stage: str
    batch_size: int
    size: tuple[int, ...]
    grid: tuple[int, ...]
    parameters: int
    resident: int
    step: int
    validation: int

    @property
    def peak(self) -> int:
        """Bytes; of the program itself come about 0.6 GB of main memory on top, and the cached data."""
        return self.resident + max(self.step, self.validation)


def trace_stage(stage: str, request: Request) -> StageMemory:
    """The memory of one stage.

    Raises:
        FibldmError: the configuration or the data are refused.
    """
    parser = stage_parser(stage, request)
    with unwrapped():
        return _trace(stage, parser, first_items(stage, parser, request), request)


def is_trained(stage: str, request: Request) -> bool:
    """Whether the stage has anything to learn; volumes that are their own latents have no autoencoder to train."""
    return bool(stage_parser(stage, request).get_parsed_content("epochs"))


def first_items(stage: str, parser: ConfigParser, request: Request) -> dict[str, Any]:
    """An item of training and one of validation: of the first case, or a latent of the same shapes as it would have.

    Args:
        stage: of training.
        parser: of `stage_parser`; gets what earlier stages would make, and the first case as its dataset.
        request: what is planned.
    """
    imagine_earlier(stage, parser, request)
    if kind_of(stage).on_latents:
        return dict.fromkeys(("train", "validate"), _latent(parser))
    return {part: _case(parser, part) for part in ("train", "validate")}


def imagine_earlier(stage: str, parser: ConfigParser, request: Request) -> None:
    """Put what earlier stages would make into a configuration: the facts of the latents, and the base network."""
    kind = kind_of(stage)
    if kind.on_latents:
        autoencoder, encoding = (stage_parser(name, request) for name in ("autoencoder", "latents"))
        parser["latents"] = imagined_latents(autoencoder, encoding, request.work)
    if kind.base is not None:
        parser["base"] = stage_parser(kind.base, request)["network_def"]


def _trace(stage: str, parser: ConfigParser, items: Mapping[str, Any], request: Request) -> StageMemory:
    get = parser.get_parsed_content
    counts = {"train": int(get("batch_size")), "validate": int(get("validate::dataloader::batch_size"))}
    batches = {part: _prepared(parser, part, item, counts[part]) for part, item in items.items()}
    live = LiveBytes()
    with without_values(live), nullcontext() if request.imitated else torch.device(request.device):
        trainer, evaluator = engines(parser)
        if request.imitated:
            _norms_in_full_precision(trainer.network)
        resident = live.now
        on_cpu = partial(held_on_cpu, checkpointed=bool(get("activation_checkpointing")))
        live.held = held_on_cuda if request.device == "cuda" else on_cpu
        live.restart()
        _train(trainer, _empty(batches["train"]))
        step = live.peak - resident
        live.restart()
        validate(evaluator, _empty(batches["validate"]), trainer.loss_function)
        inputs = batches["train"][0]
        return StageMemory(
            stage,
            batch_size=len(inputs),
            size=tuple(inputs.shape[2:]),
            grid=tuple(get("size")),
            parameters=sum(weight.numel() for weight in trainer.network.parameters()),
            resident=round(resident),
            step=round(step),
            validation=round(live.peak - resident),
        )


def stage_parser(stage: str, request: Request, *, with_values: bool = False) -> ConfigParser:
    """The configuration of a stage, for tensors without values unless it is asked for some.

    Raises:
        FibldmError: the configuration is refused.
    """
    configs = (*request.configs, *request.stage_configs.get(stage, ()))
    content = copy.deepcopy(_content(stage, request.work, configs))
    overrides = {**_meant_for(content, request.overrides), "device": "cpu" if request.imitated else request.device}
    chosen = stage_configuration(stage, work=request.work, run_dir=_RUN, configs=configs, overrides=overrides)
    parser = ConfigParser(content)
    for key, value in chosen.overrides.items():
        parser[key] = value
    if request.imitated and parser["precision"] != "float32":
        parser["precision"] = "bfloat16"
    if with_values:
        return parser
    for key, value in content.items():
        # made where they belong, as tensors without values cannot be moved
        if moved := _MOVED.fullmatch(str(value)):
            parser[key] = moved[1]
    parser["trainer_scaler"] = None  # it looks at values, and holds next to nothing
    return parser


@cache
def _content(stage: str, work: Path, configs: tuple[str, ...]) -> dict[str, Any]:
    files = stage_configuration(stage, work=work, run_dir=_RUN, configs=configs, overrides={}).files
    content: dict[str, Any] = ConfigFiles.load_config_files([str(file) for file in files])
    return content


@cache
def _shipped_keys() -> frozenset[str]:
    return frozenset(key for name in files_of_stages() for key in ConfigFiles.load_config_file(shipped(name)))


def _meant_for(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that name something of this stage, or nothing of any stage, which is then refused."""
    return {
        key: value
        for key, value in overrides.items()
        if (name := key.split("::")[0]) in content or name not in _shipped_keys()
    }


def _case(parser: ConfigParser, part: str) -> Any:
    """The first case, as training or validation takes it from its files."""
    split = {"train": "training", "validate": "validation"}[part]
    parser[part]["dataset"]["data"] = f"$load_datalist(@work, '{split}')[:1]"
    return parser.get_parsed_content(f"{part}::dataset")[Draw(0, 0, 0)]


def imagined_latents(autoencoder: ConfigParser, encoding: ConfigParser, work: Path) -> Latents:
    """What the encode stage would write of the latents of an autoencoder.

    Args:
        autoencoder: configuration of that stage.
        encoding: that of the encode stage.
        work: folder of ``fibldm prepare``.

    Raises:
        FibldmError: no case of training or validation has a mask, and only such are encoded.
    """
    get = autoencoder.get_parsed_content
    network = get("network_def")
    channels, grid = network.latent_channels, {"size": list(get("size")), "spacing": list(get("spacing"))}
    space = {"mean": [0.0] * channels, "std": [1.0] * channels, "autoencoder": ""}
    datalist = read_datalist(str(work))
    facts = {
        "space": space,
        "labels": datalist["labels"],
        "covariates": covariates_by_case(datalist["training"]),
        **about_second_images(datalist["training"]),
        "items": {split: _views(work, split, encoding) for split in _SPLITS},
        "compression": list(network.compression),
        "grid": grid,
    }
    return _Imagined(_RUN, facts, work, masks_only=bool(encoding.get_parsed_content("masks_only")))


@dataclass(frozen=True)
class _Imagined(Latents):
    """Latents that are not made yet; what is fitted to masks is so to those of the work folder."""

    work: Path
    masks_only: bool

    def training_labels(self) -> Iterator[Tensor]:
        of_grid: Any = self.facts["grid"]
        grid = ModelGrid(of_grid["spacing"], of_grid["size"])
        for case in load_datalist(str(self.work), "training", masks=self.masks_only):
            if "label" in case:
                mask = read_volume(case["label"]).canonical()
                moved = resample(mask, grid.training_grid(mask.grid), kind="label", fill=UNKNOWN_LABEL)
                yield torch.from_numpy(moved.array.astype(np.uint8))[None]


def _views(work: Path, split: str, encoding: ConfigParser) -> list[dict[str, str]]:
    views = int(encoding.get_parsed_content("views")) if split == "training" else 1
    cases = load_datalist(str(work), split, masks=bool(encoding.get_parsed_content("masks_only")))
    return [{"file": "", "case": case["case"], "subject": str(case["subject"])} for case in cases for _ in range(views)]


def _latent(parser: ConfigParser) -> dict[str, Any]:
    """A latent as `LoadLatent` reads it, with its draw."""
    facts, get = parser["latents"].facts, parser.get_parsed_content
    cells = [length // step for length, step in zip(facts["grid"]["size"], facts["compression"], strict=True)]
    channels = {"mean": get("latents").channels, "std": get("latents").channels, "valid": 1}
    conditions: dict[str, Condition] = present(get("conditions"))
    shown = {name: part.null(torch.zeros(1, *part.shape(cells)))[0] for name, part in conditions.items()}
    return {"seed": 0, "view": 0, **{name: torch.ones(n, *cells) for name, n in channels.items()}, **shown}


def _prepared(parser: ConfigParser, part: str, item: Any, count: int) -> tuple[Any, ...]:
    """A batch of one item many times, as the network gets it."""
    name = f"{part}::prepare_batch" if "prepare_batch" in parser[part] else "prepare_batch"
    prepared: tuple[Any, ...] = parser.get_parsed_content(name)(list_data_collate([item] * count), torch.device("cpu"))
    return prepared


def _empty(batch: Any) -> Any:
    """The batch without its values, but for seeds, which are read."""

    def empty(part: Tensor) -> Any:
        is_seeds = part.ndim == 1 and not part.is_floating_point()
        return part.tolist() if is_seeds else torch.empty(part.shape, dtype=part.dtype)

    return tree_map_only(Tensor, empty, batch)


def engines(parser: ConfigParser) -> tuple[Any, Any]:
    """Trainer and evaluator, without data, with all that stands in memory around them; an adversary has begun."""
    parser["train"]["trainer"]["train_data_loader"] = parser["validate"]["evaluator"]["val_data_loader"] = [
        None
    ] * _STEPS
    get = parser.get_parsed_content
    network = get("network_def")
    forget_values(network)
    if hasattr(network, "revive_below"):
        network.revive_below = 0.0  # which codes are dead is decided by values
    ready(network, lambda key: get(key) if key in parser else None)
    trainer = get("train::trainer")
    if getattr(trainer, "adversary", None) is not None:
        trainer.adversary = replace(trainer.adversary, start=0)
    return trainer, get("validate::evaluator")


def _norms_in_full_precision(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: tuple(part.float() for part in inputs))


def _train(trainer: Any, batch: Any) -> None:
    """Steps of the trainer's own, the second with the optimizer's state."""
    trainer.prepare_batch = lambda *_, **__: batch
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED, lambda: nn.utils.clip_grad_norm_(trainer.network.parameters(), 1.0)
    )
    trainer.state.epoch_length = steps = _STEPS * int(getattr(trainer, "accumulation_steps", 1))
    for trainer.state.iteration in range(1, steps + 1):
        trainer._iteration(trainer, {"seed": [0] * len(batch[0])})


@torch.no_grad()
def validate(evaluator: Any, batch: Any, loss: nn.Module) -> None:
    """Validate a prepared batch."""
    inputs, target, *more = batch
    evaluator.network.eval()
    loss(evaluator.inferer(inputs, evaluator.network, *(more[0] if more else ())), target)
