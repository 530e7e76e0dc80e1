"""Where training begins: weights of another network, and which weights stay as they are."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from fibldm.errors import FibldmError
from fibldm.manifest import MANIFEST, check_manifest
from fibldm.models.activation_checkpointing import checkpoint_activations
from fibldm.models.low_rank import add_low_rank, fits, plain_name, require_fits, train_only
from fibldm.models.tokens import VECTORS, has_tokens
from fibldm.training.precision import store_channels_last

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


def initialise(
    network: nn.Module, source: str | Path, *, strict: bool = True, stage: str = "", trust: bool = False
) -> LoadReport:
    """Begin with the weights of another network; says what was loaded and what was not.

    Args:
        network: gets the weights whose name and shape fit.
        source: a file ``.safetensors`` or one of ``torch.save``, a run folder, the folder of a stage, or a bundle of
            ``fibldm export``.
        strict: whether every weight must fit.
        stage: whose weights are meant in a run folder.
        trust: take a bundle whose files changed since its export.

    Raises:
        FibldmError: the file is missing or holds no weights, a bundle is not as it was exported, nothing fits, or, if
            ``strict``, something does not.
    """
    _check_bundle(Path(source), trust)
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


def ready(network: nn.Module, options: Callable[[str], Any]) -> list[str]:
    """Make a network what a stage trains: some weights frozen, others adapted, its blocks and memory as asked for.

    Args:
        network: changed in place.
        options: values of ``freeze``, ``lora_rank``, ``lora_weights``, ``lora_full``, ``lora_alpha``, ``lora_apart``,
            ``channels_last`` and ``activation_checkpointing``; None of a key that is not there.

    Returns:
        What is worth to be said.

    Raises:
        FibldmError: an option cannot be followed.
    """
    said = []
    if options("freeze"):
        said.append(f"{freeze(network, options('freeze'))} weights are frozen")
    tokens = [VECTORS] if options("lora_apart") and has_tokens(network) else []
    if rank := options("lora_rank"):
        full = [*options("lora_full"), *tokens]
        trained = add_low_rank(network, rank, options("lora_weights"), full, alpha=options("lora_alpha"))
        said.append(f"{trained} numbers are trained in updates of rank {rank}")
    elif tokens:
        said.append(f"{train_only(network, tokens)} numbers are trained, those of the token")
    if options("channels_last"):
        store_channels_last(network)
    if options("activation_checkpointing"):
        checkpoint_activations(network)
    return said


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
    require_fits("freeze", patterns, named)
    frozen = [weight for name, weight in named.items() if fits(name, patterns)]
    for weight in frozen:
        weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in named.values()):
        raise FibldmError(f"something must be left to train; freeze {list(patterns)} fits everything", "name less")
    return len(frozen)


def rate_groups(
    network: nn.Module,
    rate: float,
    shares: Mapping[str, float],
    *,
    beside: nn.Module | None = None,
    kernels: bool = False,
) -> list[dict[str, Any]]:
    """What is trained, in groups of one share of the learning rate each, as optimizers of torch take them.

    `fibldm.training.handlers.Schedule` follows the shares.

    Args:
        network: its weights that are trained.
        rate: of weights that no pattern fits.
        shares: of the rate by shell-style names of weights; those of all patterns that fit are multiplied.
        beside: more weights that are trained, such as those of a loss.
        kernels: put the weights of convolutions and linear layers into groups of their own, which say
            ``kernels: True``, as `fibldm.training.muon.Muon` wants them.

    Raises:
        FibldmError: a pattern fits no weight that is trained, or a share is no number above 0.
    """
    numbers = isinstance(shares, Mapping) and all(isinstance(share, int | float) for share in shares.values())
    if not numbers or not all(0 < share < math.inf for share in shares.values()):
        raise FibldmError(
            f"layer_rates must give names of weights a share of the learning rate, a number above 0; got {shares}",
            "write 0.001 rather than 1e-3, which YAML reads as text; freeze what is not to be trained",
        )
    trained = [(plain_name(name), weight) for name, weight in network.named_parameters() if weight.requires_grad]
    require_fits("layer_rates", list(shares), [name for name, _ in trained])
    apart = {id(weight) for weight in _kernels(network)} if kernels else set()
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {
        (1.0, False): [] if beside is None else list(beside.parameters())
    }
    for name, weight in trained:
        share = math.prod(float(shares[pattern]) for pattern in sorted(shares) if fits(name, [pattern]))
        groups.setdefault((share, id(weight) in apart), []).append(weight)
    return [
        {"params": weights, "lr": rate, "share": share, **({"kernels": is_kernel} if kernels else {})}
        for (share, is_kernel), weights in sorted(groups.items(), key=lambda group: group[0], reverse=True)
        if weights
    ]


def _kernels(network: nn.Module) -> Iterator[Tensor]:
    """The weights of convolutions and linear layers, but for those that are trained in updates of low rank."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | _ConvNd) and not parametrize.is_parametrized(layer, "weight"):
            yield layer.weight


def _check_bundle(source: Path, trust: bool) -> None:
    """Compare a bundle with its manifest, also where one of its files is named."""
    root = source if source.is_dir() else source.parent.parent
    if (root / MANIFEST).is_file():
        try:
            check_manifest(root, trust=trust)
        except FibldmError as error:
            remedy = error.remedy.replace("--trust", "--set init_trust=true")
            raise FibldmError(f"init_from: {error.message}", remedy) from error


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
