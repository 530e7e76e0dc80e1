"""Checkpoints and bundles of other programs, read as data: tensors, and what is said of the networks they belong to.

Containers differ from program to program, the names inside do not: a network is told by the names of its own weights,
wherever in a file they lie and whatever stands in front of them. Nothing that a file holds is run.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.utils.enums import TraceKeys
from safetensors.torch import load_file
from torch import Tensor

from fibldm.errors import FibldmError

# Every network has one weight whose name no other kind has.
MARKS = {
    "controlnet": "controlnet_mid_block.conv.weight",
    "unet": "out.2.conv.weight",
    "autoencoder": "quant_conv_mu.conv.weight",
    "vqvae": "quantizer.quantizer.embedding.weight",
}
_CLASSES = {
    "AutoencoderKL": "autoencoder",
    "AutoencoderKlMaisi": "autoencoder",
    "VQVAE": "vqvae",
    "DiffusionModelUNet": "unet",
    "DiffusionModelUNetMaisi": "unet",
    "ControlNet": "controlnet",
    "ControlNetMaisi": "controlnet",
}
_NOT_IMPORTED = {
    "to_logits.weight": "a transformer that draws codes one by one, for which FibLDM has no sampler",
    "post_quant_conv.conv.weight": "part of an autoencoder without its posterior",
    "first_stage_model.encoder.conv_in.weight": "a model of the CompVis library, whose layers are not MONAI's",
    "encoder.down.0.block.0.conv1.weight": "a model of the CompVis library, whose layers are not MONAI's",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "a model of the diffusers library, whose layers are not MONAI's",
    "down_blocks.0.resnets.0.conv1.weight": "a model of the diffusers library, whose layers are not MONAI's",
}
_ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors")
_CONFIGURATIONS = (".json", ".yaml", ".yml")
_DEEPEST = 4
_SHOWN = 5


@dataclass(frozen=True)
class Foreign:
    """One network of a checkpoint.

    Attributes:
        kind: ``autoencoder``, ``vqvae``, ``unet`` or ``controlnet``.
        weights: by the names they have there, in float32.
        file: where they come from.
        place: of the weights in the file, as keys and the beginning of names.
        facts: numbers beside the weights, such as ``scale_factor``.
    """

    kind: str
    weights: Mapping[str, Tensor]
    file: Path
    place: str
    facts: Mapping[str, float] = field(default_factory=dict)


def read_foreign(source: Path) -> list[Foreign]:
    """All networks of a file, or of the files in a folder and in its ``models``.

    Raises:
        FibldmError: there is no such file, it cannot be read without running it, or it holds no network that is known.
    """
    source = Path(source)
    found = [part for file in _files(source) for part in _networks_of(file)]
    if not found:
        raise _unknown(source)
    return found


def definitions(folder: Path) -> dict[str, Any]:
    """What the configurations of a bundle say, as it stands there: later ones go on from those of training.

    Raises:
        FibldmError: one of them is no JSON or YAML.
    """
    files = sorted(file for file in (folder / "configs").glob("*") if file.suffix in _CONFIGURATIONS)
    order = ("train_autoencoder", "train", "train_diffusion", "train_controlnet", "inference")
    known = [file for name in order for file in files if file.stem == name]
    said: dict[str, Any] = {}
    for file in [*(file for file in files if file not in known), *known]:
        content = read_values(file)
        said.update(content if isinstance(content, dict) else {})
    return said


def read_values(file: Path) -> Any:
    """The values of a JSON or YAML file.

    Raises:
        FibldmError: it cannot be read, or is neither.
    """
    try:
        text = file.read_text(encoding="utf-8")
        # values of YAML may hold themselves, or be dates
        return json.loads(text if file.suffix == ".json" else json.dumps(yaml.safe_load(text), default=str))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FibldmError(
            f"{file} must be JSON or YAML of plain values; {error}", "check the path and the file"
        ) from error


def described(said: Any, kind: str, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where a network of a kind is described, by the name of its class, and how."""
    if not isinstance(said, Mapping) or where.count("::") > _DEEPEST:
        return
    if _CLASSES.get(str(said.get("_target_")).rpartition(".")[2]) == kind:
        yield where, said
    for key, inner in said.items():
        yield from described(inner, kind, f"{where}::{key}" if where else str(key))


def resolved(value: Any, said: Mapping[str, Any], where: str, seen: tuple[str, ...] = ()) -> Any:
    """A definition with what it refers to put in its place.

    Args:
        value: the definition.
        said: what `definitions` gives.
        where: it stands, for errors.
        seen: references that led here.

    Raises:
        FibldmError: it holds an expression, which would have to be run, or refers to nothing or to itself.
    """
    if isinstance(value, Mapping):
        return {key: resolved(part, said, f"{where}::{key}", seen) for key, part in value.items()}
    if isinstance(value, list):
        return [resolved(part, said, where, seen) for part in value]
    if not isinstance(value, str) or value[:1] not in ("$", "@", "%"):
        return value
    if value[0] != "@":
        raise FibldmError(
            f"{where} must hold plain values and references; it holds the expression {value!r}",
            "give its arguments by `network`, or `trust` if you know who made this bundle: expressions run as code",
        )
    if value in seen:
        raise FibldmError(f"{where} must not refer to itself; it does by {value!r}", "ask for the bundle again")
    return resolved(_looked_up(value, said, where), said, where, (*seen, value))


def _looked_up(reference: str, said: Mapping[str, Any], where: str) -> Any:
    found: Any = said
    for key in re.split("::|#", reference[1:]):
        if not isinstance(found, Mapping) or key not in found:
            raise FibldmError(
                f"{where} must refer to what stands beside it; nothing is found for {reference!r}",
                "give its arguments by `network`",
            )
        found = found[key]
    return found


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FibldmError(f"a checkpoint must be a file or a folder; {source} does not exist", "check the path")
    files = [file for folder in (source, source / "models") for file in sorted(folder.glob("*")) if file.is_file()]
    weights = [file for file in files if file.suffix in _ENDINGS]
    if not weights:
        raise FibldmError(
            f"{source} or its folder models must hold files of weights ({', '.join(_ENDINGS)}); there are none",
            "large files of MONAI's model zoo come by `python -m monai.bundle download_large_files`",
        )
    return weights


def _networks_of(file: Path) -> list[Foreign]:
    found: dict[str, Foreign] = {}
    content = _read(file)
    facts = {"scale_factor": float(content["scale_factor"])} if _is_number(content.get("scale_factor")) else {}
    for place, tensors in _state_dicts(content):
        for kind, prefix, weights in _told(tensors):
            there = Foreign(kind, weights, file, f"{place}{prefix}", facts)
            # where a program keeps an average as well, that is the model
            if kind not in found or ("ema" in there.place and "ema" not in found[kind].place):
                found[kind] = there
    for part in found.values():
        if wrong := [name for name, value in part.weights.items() if not bool(value.isfinite().all())]:
            raise FibldmError(f"weights must be finite; {wrong[0]} of {file} is not", "ask for the checkpoint again")
    return list(found.values())


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return bool(value.ndim == 0) or tuple(value.shape) == (1,)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FibldmError(
            f"{file} must hold tensors as safetensors or by torch.save, and nothing that runs as code; {reason}",
            "save its state dict alone, as plain tensors, where you trust the file; or download it again",
        ) from error
    return {str(key): value for key, value in content.items()} if isinstance(content, Mapping) else {}


def _harmless() -> list[Any]:
    """What checkpoints of trainings with MONAI hold beside tensors: marks of MetaTensors, and numbers of NumPy."""
    scalar: Any = np.float64(0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [TraceKeys, *names, np.dtype, *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64"))]


def _state_dicts(
    content: Mapping[Any, Any], place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for name, inner in content.items():
        if isinstance(inner, Mapping) and depth < _DEEPEST:
            yield from _state_dicts(inner, f"{place}{name}/", depth + 1)


def _told(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Kind, beginning of the names, and weights of each network in a state dict."""
    for kind, mark in MARKS.items():
        prefixes = [name.removesuffix(mark) for name in tensors if name == mark or name.endswith(f".{mark}")]
        for prefix in prefixes[:1]:
            inside = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
            yield kind, prefix, {name: _plain(part) for name, part in inside.items()}


def _plain(tensor: Tensor) -> Tensor:
    plain = tensor.detach().as_subclass(Tensor)
    return plain.float() if plain.is_floating_point() else plain


def _unknown(source: Path) -> FibldmError:
    names = [name for file in _files(source) for _, tensors in _state_dicts(_read(file)) for name in tensors]
    for mark, what in _NOT_IMPORTED.items():
        if any(name.endswith(mark) for name in names):
            return FibldmError(f"{source} holds {what}", "train a network of FibLDM on your data instead")
    shown = ", ".join(names[:_SHOWN]) or "no tensors at all"
    return FibldmError(
        f"{source} must hold a network of MONAI, monai-generative or MAISI: AutoencoderKL, VQVAE, "
        f"DiffusionModelUNet or ControlNet; it begins with {shown}",
        "check that it is such a checkpoint; other layouts cannot be told apart by shapes alone",
    )
