"""Where training begins: weights of another network, and which weights stay as they are."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fibldm.errors import FibldmError

_logger = logging.getLogger("fibldm")

# Under which names training programs keep the weights in a file that holds more than them.
_NESTED = ("model", "state_dict", "network", "ema", "unet_state_dict", "autoencoder_state_dict", "objects")
_SHOWN = 5


@dataclass(frozen=True)
class LoadReport:
    """What became of the weights of a file; names as in the network, but for ``unexpected``.

    Attributes:
        loaded: taken from the file.
        missing: of the network, not in the file.
        unexpected: in the file, not of the network.
        other_shapes: in both with different shapes: name, shape in the file, shape in the network.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.other_shapes)

    def __str__(self) -> str:
        shapes = [f"{name} {given} for {wanted}" for name, given, wanted in self.other_shapes]
        parts = {"missing": self.missing, "unexpected": self.unexpected, "other shapes": shapes}
        listed = "; ".join(f"{len(names)} {what}{_first(names)}" for what, names in parts.items())
        return f"{len(self.loaded)} loaded; {listed}"


def initialise(network: nn.Module, source: str | Path, *, strict: bool = True, stage: str = "") -> LoadReport:
    """Begin with the weights of another network; says what was loaded and what was not.

    Args:
        network: gets the weights whose name and shape fit.
        source: a file ``.safetensors`` or one of ``torch.save``, a run folder, the folder of a stage, or a bundle of
            ``fibldm export``.
        strict: whether every weight must fit.
        stage: whose weights are meant in a run folder.

    Raises:
        FibldmError: the file is missing or holds no weights, nothing fits, or, if ``strict``, something does not.
    """
    given, wanted = read_weights(Path(source), stage), network.state_dict()
    both = [name for name in wanted if name in given]
    fitting = {name: given[name] for name in both if given[name].shape == wanted[name].shape}
    report = LoadReport(
        loaded=tuple(fitting),
        missing=tuple(name for name in wanted if name not in given),
        unexpected=tuple(name for name in given if name not in wanted),
        other_shapes=tuple(
            (name, tuple(given[name].shape), tuple(wanted[name].shape)) for name in both if name not in fitting
        ),
    )
    if not fitting or (strict and not report.complete):
        raise FibldmError(
            f"the weights of {source} must fit the network; {report}",
            "give the network of the weights, or set init_strict: false to begin with those that fit"
            if fitting
            else "check that it is the same kind of network and stage",
        )
    network.load_state_dict({**wanted, **fitting})
    _logger.info("weights of %s: %s", source, report)
    return report


def read_weights(source: Path, stage: str = "") -> dict[str, Tensor]:
    """The tensors of a state dict by name, on the CPU; of a run, those that the stage ended with.

    Raises:
        FibldmError: there is no such file, it cannot be read, or it holds no weights.
    """
    file = _file_of(source, stage)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FibldmError(
            f"{file} must hold weights as safetensors or by torch.save; {error}",
            "save the state dict alone, as plain tensors",
        ) from error
    weights = _tensors(content)
    if not weights:
        raise FibldmError(f"{file} must hold a state dict; found no tensors by name", "save the state dict alone")
    return weights


def freeze(network: nn.Module, patterns: Sequence[str]) -> int:
    """Take weights out of training by their names.

    Args:
        network: changed in place.
        patterns: shell-style, such as ``network.encoder.*``.

    Returns:
        The number of weights that are not trained because of it.

    Raises:
        FibldmError: a pattern fits no name, or nothing is left to train.
    """
    named = dict(network.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise FibldmError(
                f"freeze must name weights of the network; {pattern!r} fits none",
                f"they have names such as {', '.join(list(named)[:_SHOWN])}",
            )
    frozen = [weight for name, weight in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for weight in frozen:
        weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in named.values()):
        raise FibldmError(f"something must be left to train; freeze {list(patterns)} fits everything", "name less")
    return len(frozen)


def rate_groups(
    network: nn.Module, rate: float, factors: Mapping[str, float], *, beside: nn.Module | None = None
) -> list[dict[str, Any]]:
    """What is trained, in groups of one learning rate each, as optimizers of torch take them.

    Args:
        network: its weights that are trained.
        rate: of weights that no pattern fits.
        factors: share of the rate by shell-style names of weights; the first that fits counts.
        beside: more weights that are trained, such as those of a loss.

    Raises:
        FibldmError: a pattern fits no weight that is trained, or a share is not above 0.
    """
    groups: dict[str, dict[str, Any]] = {
        pattern: {"params": [], "lr": rate * factor} for pattern, factor in factors.items()
    }
    rest = [] if beside is None else list(beside.parameters())
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            pattern = next((pattern for pattern in groups if fnmatchcase(name, pattern)), None)
            (rest if pattern is None else groups[pattern]["params"]).append(weight)
    for pattern, group in groups.items():
        if not group["params"] or not group["lr"] > 0:
            raise FibldmError(
                f"layer_rates must give names of trained weights a share above 0; {pattern!r} fits "
                f"{len(group['params'])} and has {factors[pattern]}",
                "freeze what is not to be trained" if group["params"] else "check the names",
            )
    first = [{"params": rest, "lr": rate}] if rest else []
    return [*first, *groups.values()]


def _file_of(source: Path, stage: str) -> Path:
    of_bundle = source / "models" / f"{'autoencoder' if stage == 'autoencoder' else 'network'}.safetensors"
    candidates = [source / "checkpoints" / "best.pt", source / stage / "checkpoints" / "best.pt", of_bundle]
    file = next((file for file in candidates if file.is_file()), None) if source.is_dir() else source
    if file is None or not file.is_file():
        raise FibldmError(
            f"init_from must be a file of weights, a run folder whose stage {stage!r} is trained, a stage's folder or "
            f"a bundle; got {source}",
            "check the path",
        )
    return file


def _tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    return next((found for name in _NESTED if (found := _tensors(content.get(name)))), {})


def _first(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f" ({', '.join(names[:_SHOWN])}{more})" if names else ""
