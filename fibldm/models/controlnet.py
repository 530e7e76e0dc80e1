"""ControlNet: a trainable copy of the base network's encoder that adds residuals (Zhang et al. 2023)."""

from monai.networks.nets import ControlNet, DiffusionModelUNet, SPADEDiffusionModelUNet
from torch import nn

from fibldm.errors import FibldmError

_OWN_PARTS = ("controlnet_",)
_DECODER_PARTS = ("up_blocks.", "out.")


def copy_base_weights(controlnet: ControlNet, unet: DiffusionModelUNet | SPADEDiffusionModelUNet) -> ControlNet:
    """Start a ControlNet from its base network: every layer they share gets the base network's weights.

    The outputs of its own layers stay zero, as MONAI initialises them, so that at the start the ControlNet changes
    nothing. MONAI's embedding of the mask ends in a zero layer of its own; it starts at random here, since two zeros in
    a row give the mask no gradient until the first one has moved.

    Raises:
        FibldmError: the two were not built with the same numbers.
    """
    own, base = _layers(controlnet, _OWN_PARTS), _layers(unet, _DECODER_PARTS)
    wrong = [name for name in {**own, **base} if own.get(name) != base.get(name)]
    if wrong:
        raise FibldmError(
            f"the ControlNet must be built with the numbers of its base network; {len(wrong)} layers differ, "
            f"first {wrong[0]!r}",
            "give both the same channels, num_res_blocks, attention_levels, num_head_channels and norm_num_groups",
        )
    shared = {name: value for name, value in unet.state_dict().items() if not name.startswith(_DECODER_PARTS)}
    controlnet.load_state_dict({**controlnet.state_dict(), **shared})
    controlnet.controlnet_cond_embedding.conv_out.conv.reset_parameters()
    return controlnet


def _layers(network: nn.Module, left_out: tuple[str, ...]) -> dict[str, tuple[object, ...]]:
    """What each innermost layer computes, but for its weights; the number of heads has no weight of its own."""
    return {
        name: (type(layer), layer.extra_repr(), getattr(layer, "num_heads", None))
        for name, layer in network.named_modules()
        if not f"{name}.".startswith(left_out) and (hasattr(layer, "num_heads") or not any(layer.children()))
    }
