"""A network of another program becomes one of FibLDM: its arguments, its weights by their present names, a comparison.

MONAI's own ``load_old_state_dict`` maps no ControlNet without context; the mapping here is one for all networks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import generative.networks.nets as old
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.bundle import ConfigParser
from monai.networks import nets
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.importing.architecture import HIDDEN, fixed_tensors, is_maisi, read_arguments
from fibldm.importing.checkpoint import Foreign, described, resolved
from fibldm.synthesis.definitions import build

_TARGETS = {
    "autoencoder": "monai.networks.nets.AutoencoderKL",
    "vqvae": "monai.networks.nets.VQVAE",
    "unet": "monai.networks.nets.DiffusionModelUNet",
    "controlnet": "monai.networks.nets.ControlNet",
}
_MAISI_AUTOENCODER = "monai.apps.generation.maisi.networks.autoencoderkl_maisi.AutoencoderKlMaisi"
_MAISI_MEMORY = {"num_splits": 1, "norm_float16": False, "save_mem": False}
_CLASSES: Mapping[tuple[str, str], type[nn.Module]] = {
    ("monai-generative", "autoencoder"): old.AutoencoderKL,
    ("monai-generative", "unet"): old.DiffusionModelUNet,
    ("monai-generative", "controlnet"): old.ControlNet,
    ("monai", "autoencoder"): nets.AutoencoderKL,
    ("monai", "vqvae"): old.VQVAE,  # both programs have the same names; MONAI's is what is compared
    ("monai", "unet"): nets.DiffusionModelUNet,
    ("monai", "controlnet"): nets.ControlNet,
    ("maisi", "autoencoder"): AutoencoderKlMaisi,
    ("maisi", "unet"): DiffusionModelUNetMaisi,
}
# Speed and memory; training of others; and what the names of the weights decide.
_LEFT_OUT = (
    "use_checkpoint use_checkpointing use_flash_attention ddp_sync num_splits dim_split norm_float16 print_info "
    "save_mem include_fc use_combined_linear"
).split()
_FURTHER = "include_top_region_index_input include_bottom_region_index_input include_spacing_input".split()
# Of all these classes, where somebody says with what they were built and leaves it out.
_DEFAULTS = {"norm_num_groups": 32, "num_head_channels": 8}
_PER_LEVEL = ("num_res_blocks", "num_res_channels")
_OLD_NAMES = re.compile(r"\.proj_attn\.|\.to_out\.0\.|^decoder\.blocks\.\d+\.conv\.conv\.weight$")
_UNUSED = re.compile(r"\.proj_attn\.(weight|bias)$")  # monai-generative makes it and never calls it
_SHOWN = 3


def layout(part: Foreign) -> str:
    """``monai-generative``, ``monai`` or ``maisi``, by the names of the weights."""
    if is_maisi(part.weights):
        return "maisi"
    return "monai-generative" if any(_OLD_NAMES.search(name) for name in part.weights) else "monai"


def arguments_of(
    part: Foreign, said: Mapping[str, Any], given: Mapping[str, Any], *, trust: bool = False
) -> dict[str, Any]:
    """What a network was built with, in the terms of MONAI's present class.

    Args:
        part: the network.
        said: definitions, or plain arguments, from a bundle or a file; what they leave out is as by default.
        given: arguments that count more than those.
        trust: run the expressions in definitions.

    Raises:
        FibldmError: something is not known, or would have to be run.
    """
    read = read_arguments(part.kind, part.weights)
    found = {
        **read,
        **_said_of(part.kind, read, said, trust),
        **_present_arguments(given, levels=len(read["channels"])),
    }
    # what is given for several networks need not concern each of them
    others = {name for names in HIDDEN.values() for name in names}.difference(HIDDEN[part.kind])
    found = {key: value for key, value in found.items() if key not in others}
    if missing := [name for name in HIDDEN[part.kind] if name not in found]:
        raise FibldmError(
            f"{', '.join(missing)} of the {part.kind} in {part.file} must be known, and cannot be read from weights",
            f"give {'them' if len(missing) > 1 else 'it'} by `network`, a file with the definition, or by "
            f"`arguments` {missing[0]}=...",
        )
    return {**found, **_decided_by_names(part)}


def definition_of(part: Foreign, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The definition of FibLDM's network: a first stage, or MONAI's UNet or ControlNet."""
    plain = {key: value for key, value in arguments.items() if key not in (*_FURTHER, "num_class_embeds")}
    network = {"_target_": _TARGETS[part.kind], **plain}
    if layout(part) == "maisi" and part.kind == "autoencoder":
        renamed = {"num_channels" if key == "channels" else key: value for key, value in plain.items()}
        network = {"_target_": _MAISI_AUTOENCODER, **renamed, **_MAISI_MEMORY}
        return {"_target_": "fibldm.models.maisi.MaisiAutoencoder", "network": network}
    if part.kind == "autoencoder":
        return {"_target_": "fibldm.models.autoencoder.Autoencoder", "network": network}
    if part.kind == "vqvae":  # monai-generative trains diffusion on codes
        first_stage = "fibldm.models.vector_quantised.VectorQuantisedAutoencoder"
        return {"_target_": first_stage, "quantised_latents": True, "network": network}
    return network


def converted(
    part: Foreign, definition: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """MONAI's network with the weights, the state of FibLDM's network around it, and what became of the names.

    Args:
        part: what is converted.
        definition: of `definition_of`.
        weights: of the part, without those of inputs that FibLDM does not have.

    Raises:
        FibldmError: definition and weights do not fit.
    """
    whole: nn.Module = build(
        {"_target_": "fibldm.models.network.ConditionedNetwork", "unet": definition}
        if part.kind == "unet"
        else definition,
        f"the definition of the {part.kind} in {part.file}",
    )
    network = {"unet": "unet", "controlnet": ""}.get(part.kind, "network")
    inner: Any = whole.get_submodule(network)
    names = {name: _present_name(name, inner.state_dict()) for name in weights}
    kept = {present: weights[name] for name, present in names.items() if present}
    _load(inner, kept, part)
    before = "controls.0.controlnet." if part.kind == "controlnet" else ""
    state = {f"{before}{name}": value.detach().clone() for name, value in whole.state_dict().items()}
    mapped = {
        "weights": len(kept),
        "renamed": {name: present for name, present in names.items() if present and present != name},
        "left_out": [name for name, present in names.items() if not present],
    }
    return inner.eval(), state, mapped


def parity(
    part: Foreign, arguments: Mapping[str, Any], network: nn.Module, fixed: Mapping[str, Sequence[float]]
) -> tuple[str, float]:
    """The class of the other program, and by how much its network differs from ``network`` for the same random input.

    The difference is that of the largest value, or of 1 where all are smaller.

    Raises:
        FibldmError: the other program's own network does not fit the weights.
    """
    kind = _CLASSES[layout(part), part.kind]
    try:
        original = kind(**_their_arguments(kind, arguments))
    except (TypeError, ValueError) as error:
        raise FibldmError(
            f"arguments must be those of {kind.__name__}; {error}", "correct `network` or `arguments`"
        ) from error
    _load(original, part.weights, part)
    inputs = _inputs(part.kind, arguments)
    with torch.no_grad():
        theirs = _outputs(original.eval(), part.kind, inputs, arguments, fixed_tensors(fixed, len(inputs[0])))
        ours = _outputs(network, part.kind, inputs, arguments, {})
    largest = max(1.0, *(float(tensor.abs().max()) for tensor in theirs))
    difference = max(float((one - two).abs().max()) for one, two in zip(theirs, ours, strict=True)) / largest
    return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}", difference


def _said_of(kind: str, read: Mapping[str, Any], said: Mapping[str, Any], trust: bool) -> dict[str, Any]:
    """Of all definitions of a kind, the first that agrees with what can be read from the weights."""
    found = list(described(said, kind))
    refused: list[FibldmError] = []
    for where, definition in found:
        try:
            plain = _run(said, where) if trust else resolved(dict(definition), said, where or "`network`")
        except FibldmError as error:
            refused.append(error)
            continue
        arguments = _present_arguments(plain, levels=len(read["channels"]))
        if all(arguments.get(key, value) == value for key, value in read.items() if key not in HIDDEN[kind]):
            return {**_DEFAULTS, **arguments}
    if refused:
        raise refused[0]
    if found:
        names = ", ".join(where for where, _ in found)
        raise FibldmError(
            f"the definition must fit the weights, which are those of a {kind} with {dict(read)}; none of {names} does",
            "give the definition that belongs to these weights by `network`",
        )
    several = "_target_" in said or any(isinstance(value, Mapping) for value in said.values())
    if several or not said:
        return {}
    plain = resolved(dict(said), said, "`network`")
    return {**_DEFAULTS, **_present_arguments(plain, levels=len(read["channels"]))}


def _run(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    parser = ConfigParser(dict(said))
    try:
        names = [name for name in parser[where] if not name.startswith("_")]
        return {name: parser.get_parsed_content(f"{where}::{name}" if where else name) for name in names}
    except Exception as error:
        raise FibldmError(f"{where} must come to plain values; {error}", "give its arguments by `network`") from error


def _present_arguments(given: Mapping[str, Any], *, levels: int) -> dict[str, Any]:
    """By the names of MONAI's present classes, without what changes no result."""
    named = {"channels" if key == "num_channels" else key: _listed(value) for key, value in given.items()}
    kept = {key: value for key, value in named.items() if key not in _LEFT_OUT and not key.startswith("_")}
    per_level = {key: [kept[key]] * levels for key in _PER_LEVEL if isinstance(kept.get(key), int)}
    return {**kept, **per_level}


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value


def _decided_by_names(part: Foreign) -> dict[str, Any]:
    if part.kind == "vqvae":
        return {}
    # monai-generative has an output projection in its transformers only; elsewhere it makes one and never calls it
    projections = (".out_proj.weight", ".to_out.0.weight")
    combined = any(name.endswith(".qkv.weight") for name in part.weights)
    return {"include_fc": any(name.endswith(projections) for name in part.weights), "use_combined_linear": combined}


def _their_arguments(kind: type[nn.Module], arguments: Mapping[str, Any]) -> dict[str, Any]:
    ours = dict(arguments)
    if kind.__module__.startswith("generative"):
        ours = {key: value for key, value in ours.items() if key not in ("include_fc", "use_combined_linear")}
    if kind in (nets.AutoencoderKL, nets.DiffusionModelUNet, nets.ControlNet):
        return ours
    named = {"num_channels" if key == "channels" else key: value for key, value in ours.items()}
    return {**named, **_MAISI_MEMORY} if kind is AutoencoderKlMaisi else named


def _present_name(name: str, wanted: Mapping[str, Tensor]) -> str:
    """The name that a weight has today; its own where none fits, and none where nothing ever used it."""
    return next((one for one in _present_names(name) if one in wanted), "" if _UNUSED.search(name) else name)


def _present_names(name: str) -> Iterator[str]:
    yield name
    yield re.sub(r"\.(to_[qkv])\.", r".attn.\1.", name)
    yield name.replace(".to_out.0.", ".out_proj.")
    yield name.replace(".conv.conv.", ".postconv.conv.")


def _load(network: nn.Module, weights: Mapping[str, Tensor], part: Foreign) -> None:
    wanted = network.state_dict()
    shapes = [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    differences = {"lack": wanted.keys() - weights.keys(), "hold also": weights.keys() - wanted.keys()}
    said = [f"{what} {_few(sorted(names))}" for what, names in differences.items() if names]
    said += [f"have other shapes for {_few(shapes)}"] if shapes else []
    if said:
        raise FibldmError(
            f"weights of {part.file} must fit {type(network).__name__}; they {', and '.join(said)}",
            "give what it was built with by `network`; a network of another class cannot be imported",
        )
    network.load_state_dict(dict(weights))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _inputs(kind: str, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Random inputs of two samples, small but large enough that attention has something to weigh."""
    generator = torch.Generator().manual_seed(0)
    levels, dims = len(arguments["channels"]), int(arguments["spatial_dims"])

    def volume(channels: int, size: int) -> Tensor:
        return torch.randn(2, channels, *(size,) * dims, generator=generator)

    if kind in ("autoencoder", "vqvae"):
        return (volume(arguments["in_channels"], 2 ** (levels + 1)),)
    size = 2**levels
    width = arguments.get("cross_attention_dim") or 1
    inputs = (volume(arguments["in_channels"], size), torch.tensor([37.0, 800.0]))
    context = torch.randn(2, 3, width, generator=generator)
    if kind == "unet":
        return (*inputs, context)
    halvings = len(arguments["conditioning_embedding_num_channels"]) - 1
    return (*inputs, context, volume(arguments["conditioning_embedding_in_channels"], size * 2**halvings))


def _outputs(
    network: Any, kind: str, inputs: Sequence[Tensor], arguments: Mapping[str, Any], further: Mapping[str, Tensor]
) -> list[Tensor]:
    if kind == "autoencoder":
        mean, std = network.encode(inputs[0])
        return [mean, std, network.decode(mean)]
    if kind == "vqvae":
        encoded = network.encode(inputs[0])
        return [encoded, network.decode(encoded), network(inputs[0])[0]]
    given = {"context": inputs[2], **further} if arguments.get("with_conditioning") else dict(further)
    if kind == "unet":
        return [network(inputs[0], inputs[1], **given)]
    down, middle = network(inputs[0], inputs[1], controlnet_cond=inputs[3], **given)
    return [*down, middle]
