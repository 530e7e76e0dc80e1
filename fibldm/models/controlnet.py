"""ControlNet: a trainable copy of the base network's encoder that adds residuals (Zhang et al. 2023)."""

from monai.networks.nets import ControlNet, DiffusionModelUNet

from fibldm.errors import FibldmError

_OWN_PARTS = ("controlnet_",)


def copy_base_weights(controlnet: ControlNet, unet: DiffusionModelUNet) -> ControlNet:
    """Start a ControlNet from its base network: every layer they share gets the base network's weights.

    The layers of its own stay as MONAI initialises them, with zero-valued outputs, so that at the start the ControlNet
    changes nothing.

    Raises:
        FibldmError: the two were not built with the same numbers.
    """
    base = unet.state_dict()
    state = controlnet.state_dict()
    shared = [name for name in state if not name.startswith(_OWN_PARTS)]
    wrong = [name for name in shared if name not in base or base[name].shape != state[name].shape]
    if wrong:
        raise FibldmError(
            f"the ControlNet must be built with the numbers of its base network; {len(wrong)} layers differ, "
            f"first {wrong[0]!r}",
            "give both the same channels, num_res_blocks, attention_levels and num_head_channels",
        )
    state.update({name: base[name].clone() for name in shared})
    controlnet.load_state_dict(state)
    return controlnet
