"""What the weights of another program's network tell of it: its numbers, and which inputs it asks for.

Names are those of MONAI's present classes, of monai-generative's, or of MAISI's; arguments are named as MONAI's present
classes name them. What leaves no trace in the weights is not in the result, see `HIDDEN`.

A UNet or ControlNet may ask for modality, spacing and body region. These reach it by the embedding of time only: what
they add does not depend on the volume. A network that is only ever told one value of each is therefore, exactly, one
that is told the time alone, with other weights: see `fold`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from fibldm.errors import FibldmError

Weights = Mapping[str, Tensor]

HIDDEN = {
    "autoencoder": ("norm_num_groups",),
    "vqvae": ("downsample_parameters", "upsample_parameters"),
    "unet": ("norm_num_groups", "num_head_channels"),
    "controlnet": ("norm_num_groups", "num_head_channels"),
}

# Of further inputs of MAISI's UNet: the layer that embeds each, in the order in which they are joined.
INPUT_LAYERS = {
    "top_region": "top_region_index_layer",
    "bottom_region": "bottom_region_index_layer",
    "spacing": "spacing_layer",
}

_STRIDES = {4: (2, 4, 1, 1), 3: (1, 3, 1, 1)}  # the two that are in use: halve, or keep the size

CLASS = "class"
_MAISI_SCALE = 100.0  # MAISI tells its UNet hundredths of millimetres, and 100 for the body region that is meant
_LENGTHS = {CLASS: 1, "top_region": 4, "bottom_region": 4, "spacing": 3}
_MEANINGS = {
    CLASS: "number of the class, such as MAISI's modality, 1 for CT",
    "top_region": "1 for the region that is at the top, of head, chest, abdomen and legs: 0,1,0,0",
    "bottom_region": "the same of the bottom: 0,0,1,0",
    "spacing": "millimetres along each axis: 1.5,1.5,1.5",
}


def read_arguments(kind: str, weights: Weights) -> dict[str, Any]:
    """Arguments of a network ``autoencoder``, ``vqvae``, ``unet`` or ``controlnet``.

    Raises:
        FibldmError: layers are in an order that no network of this kind has.
    """
    try:
        return _READERS[kind](weights)
    except (KeyError, IndexError, StopIteration, AttributeError) as error:
        raise FibldmError(
            f"weights must be those of a whole {kind}; a layer is missing or out of order ({error})",
            "give what it was built with by `network`",
        ) from error


def _autoencoder(weights: Weights) -> dict[str, Any]:
    if is_maisi(weights):  # which wraps every convolution of its blocks once more
        weights = {re.sub(r"(blocks\..*?)conv\.conv\.", r"\1conv.", name): part for name, part in weights.items()}
    encoder = _blocks(weights, "encoder")
    first = weights["encoder.blocks.0.conv.weight"]
    levels = "".join(letter for letter, _ in encoder[1:-2]).split("d")
    nonlocal_attention = _ends_with_attention(levels[-1])
    levels[-1] = levels[-1].removesuffix("rar") if nonlocal_attention else levels[-1]
    # every level begins with a residual block that has its number of channels
    starts = [1, *(place + 1 for place, (letter, _) in enumerate(encoder) if letter == "d")]
    decoder = "".join(letter for letter, _ in _blocks(weights, "decoder")[1:-2]).split("u")
    return {
        "spatial_dims": first.ndim - 2,
        "in_channels": first.shape[1],
        "out_channels": _last(weights, "decoder").shape[0],
        "channels": [encoder[place][1] for place in starts],
        "num_res_blocks": [level.count("r") for level in levels],
        "attention_levels": ["a" in level for level in levels],
        "latent_channels": weights["post_quant_conv.conv.weight"].shape[0],
        "with_encoder_nonlocal_attn": nonlocal_attention,
        "with_decoder_nonlocal_attn": decoder[0] == f"rar{levels[-1]}",
    }


def _blocks(weights: Weights, part: str) -> list[tuple[str, int]]:
    """Letter of each block in a row (residual, attention, down, up, convolution, norm), and its channels."""
    inner: dict[int, list[str]] = {}
    for name in weights:
        if found := re.match(rf"{part}\.blocks\.(\d+)\.(.+)", name):
            inner.setdefault(int(found[1]), []).append(found[2])
    return [_block(weights, f"{part}.blocks.{place}", inner[place], part) for place in range(len(inner))]


def _block(weights: Weights, prefix: str, names: list[str], part: str) -> tuple[str, int]:
    if "conv1.conv.weight" in names:
        return "r", weights[f"{prefix}.conv1.conv.weight"].shape[0]
    if "norm.weight" in names:
        return "a", 0
    if "conv.conv.weight" in names or "postconv.conv.weight" in names or "deconv.weight" in names:
        return ("d" if part == "encoder" else "u"), 0
    return ("c" if "conv.weight" in names else "n"), 0


def _ends_with_attention(level: str) -> bool:
    """Whether residual block, attention, residual block come after a level, which ends in attention or has none."""
    rest = level.removesuffix("rar")
    return rest != level and bool(re.fullmatch(r"r+|(ra)+", rest))


def _last(weights: Weights, part: str) -> Tensor:
    last = max(int(name.split(".")[2]) for name in weights if name.startswith(f"{part}.blocks."))
    return weights[f"{part}.blocks.{last}.conv.weight"]


def _vqvae(weights: Weights) -> dict[str, Any]:
    encoder, decoder = _units(weights, "encoder"), _units(weights, "decoder")
    down = [weights[name] for name, residual in encoder[:-1] if not residual]
    up = [weights[name] for name, residual in decoder[1:] if not residual]
    residual = [weights[name] for name, is_residual in encoder if is_residual]
    layers = len(residual) // len(down)
    codes = weights["quantizer.quantizer.embedding.weight"]
    numbers = {
        "spatial_dims": down[0].ndim - 2,
        "in_channels": down[0].shape[1],
        "out_channels": up[-1].shape[1],
        "channels": [layer.shape[0] for layer in down],
        "num_res_layers": layers,
        "num_res_channels": [layer.shape[0] for layer in residual[::layers]] if layers else [1] * len(down),
        "num_embeddings": codes.shape[0],
        "embedding_dim": codes.shape[1],
    }
    if all(layer.shape[2] in _STRIDES for layer in (*down, *up)):
        numbers["downsample_parameters"] = [list(_STRIDES[layer.shape[2]]) for layer in down]
        numbers["upsample_parameters"] = [[*_STRIDES[layer.shape[2]], 0] for layer in up]
    return numbers


def _units(weights: Weights, part: str) -> list[tuple[str, bool]]:
    """The first convolution of each block in a row, and whether it is one of a residual unit."""
    pattern = re.compile(rf"{part}\.blocks\.(\d+)\.(conv1\.)?conv\.weight")
    found = sorted((int(match[1]), name, bool(match[2])) for name in weights if (match := pattern.fullmatch(name)))
    return [(name, residual) for _, name, residual in found]


def _unet(weights: Weights) -> dict[str, Any]:
    numbers = {**_down(weights), "out_channels": weights["out.2.conv.weight"].shape[0]}
    for name, layer in INPUT_LAYERS.items():
        if f"{layer}.0.weight" in weights:
            key = "include_spacing_input" if name == "spacing" else f"include_{name}_index_input"
            numbers[key] = True
    return numbers


def _controlnet(weights: Weights) -> dict[str, Any]:
    embedding = "controlnet_cond_embedding"
    first = weights[f"{embedding}.conv_in.conv.weight"]
    pattern = re.compile(rf"{embedding}\.blocks\.(\d+)\.conv\.weight")
    halving = sorted(
        (int(found[1]), name) for name in weights if (found := pattern.fullmatch(name)) and int(found[1]) % 2
    )
    return {
        **_down(weights),
        "conditioning_embedding_in_channels": first.shape[1],
        "conditioning_embedding_num_channels": [first.shape[0], *(weights[name].shape[0] for _, name in halving)],
    }


def _down(weights: Weights) -> dict[str, Any]:
    """What UNet and ControlNet share: the way down and the middle."""
    first = weights["conv_in.conv.weight"]
    levels = range(_count(weights, r"down_blocks\.(\d+)\."))
    context = next((weights[name].shape[1] for name in weights if name.endswith(".attn2.to_k.weight")), None)
    numbers: dict[str, Any] = {
        "spatial_dims": first.ndim - 2,
        "in_channels": first.shape[1],
        "channels": [weights[f"down_blocks.{level}.resnets.0.conv1.conv.weight"].shape[0] for level in levels],
        "num_res_blocks": [_count(weights, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in levels],
        "attention_levels": [_count(weights, rf"down_blocks\.{level}\.attentions\.(\d+)\.") > 0 for level in levels],
        "resblock_updown": "down_blocks.0.downsampler.conv1.conv.weight" in weights,
        "with_conditioning": context is not None,
    }
    if context is not None:
        numbers["cross_attention_dim"] = context
        numbers["transformer_num_layers"] = _count(weights, r"middle_block\.attention\.transformer_blocks\.(\d+)\.")
    if "class_embedding.weight" in weights:
        numbers["num_class_embeds"] = weights["class_embedding.weight"].shape[0]
    return numbers


def _count(weights: Weights, pattern: str) -> int:
    return 1 + max((int(found[1]) for name in weights if (found := re.match(pattern, name))), default=-1)


def is_maisi(weights: Weights) -> bool:
    """Whether an autoencoder is MAISI's, or a UNet knows spacing or body region."""
    return "encoder.blocks.0.conv.conv.weight" in weights or any(
        f"{layer}.0.weight" in weights for layer in INPUT_LAYERS.values()
    )


def inputs_of(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the inputs beside latent, time and context that a UNet or ControlNet asks for."""
    classes = (CLASS,) if "class_embedding.weight" in weights else ()
    return classes + tuple(name for name, layer in INPUT_LAYERS.items() if f"{layer}.0.weight" in weights)


def fixed_of(weights: Mapping[str, Tensor], fixed: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Of the values that are given, those of a network's further inputs.

    Raises:
        FibldmError: a value is missing, or cannot be.
    """
    wanted = inputs_of(weights)
    if missing := [name for name in wanted if name not in fixed]:
        meaning = "; ".join(f"`fixed` {name}=...: {_MEANINGS[name]}" for name in missing)
        raise FibldmError(
            f"FibLDM tells a network latent, time, mask and context; this one also asks for {', '.join(missing)}",
            f"give the value for which it is imported ({meaning})",
        )
    for name in wanted:
        if len(fixed[name]) != _LENGTHS[name]:
            raise FibldmError(f"`fixed` {name} needs {_LENGTHS[name]} numbers; got {len(fixed[name])}", _MEANINGS[name])
    if CLASS in wanted and fixed[CLASS][0] not in range(len(weights["class_embedding.weight"])):
        last = len(weights["class_embedding.weight"]) - 1
        raise FibldmError(f"`fixed` class must be 0 to {last}; got {fixed[CLASS][0]:g}")
    return {name: fixed[name] for name in wanted}


def fixed_tensors(fixed: Mapping[str, Sequence[float]], batch: int) -> dict[str, Tensor]:
    """The values as keyword arguments of MAISI's networks."""
    given = {}
    for name, value in fixed.items():
        if name == CLASS:
            given["class_labels"] = torch.full((batch,), int(value[0]))
        else:
            key = "spacing_tensor" if name == "spacing" else f"{name}_index_tensor"
            given[key] = _MAISI_SCALE * torch.tensor([list(value)] * batch)
    return given


def fold(weights: Mapping[str, Tensor], fixed: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """Weights of the same network without further inputs, which says what this one says of the fixed values.

    Args:
        weights: of a UNet or ControlNet of MONAI or MAISI.
        fixed: a value for each of its `inputs_of`.
    """
    layers = tuple(layer for name, layer in INPUT_LAYERS.items() if name in fixed)
    folded = {name: value for name, value in weights.items() if not name.startswith((*layers, "class_embedding."))}
    if CLASS in fixed:
        added = weights["class_embedding.weight"][int(fixed[CLASS][0])]
        folded["time_embed.2.bias"] = weights["time_embed.2.bias"] + added
    if not layers:
        return folded
    width = len(weights["time_embed.2.bias"])
    constant = silu(torch.cat([_embedding(weights, name, fixed[name]) for name in INPUT_LAYERS if name in fixed]))
    for name in [name for name in folded if name.endswith("time_emb_proj.weight")]:
        matrix, bias = weights[name], name.removesuffix("weight") + "bias"
        folded[name] = matrix[:, :width].clone()
        folded[bias] = (weights[bias].double() + matrix[:, width:].double() @ constant).to(matrix)
    return folded


def _embedding(weights: Mapping[str, Tensor], name: str, value: Sequence[float]) -> Tensor:
    layer = INPUT_LAYERS[name]
    first, second = ((weights[f"{layer}.{place}.weight"], weights[f"{layer}.{place}.bias"]) for place in (0, 2))
    hidden = silu(linear(_MAISI_SCALE * torch.tensor(list(value)).double(), first[0].double(), first[1].double()))
    return linear(hidden, second[0].double(), second[1].double())


_READERS: Mapping[str, Callable[[Weights], dict[str, Any]]] = {
    "autoencoder": _autoencoder,
    "vqvae": _vqvae,
    "unet": _unet,
    "controlnet": _controlnet,
}
