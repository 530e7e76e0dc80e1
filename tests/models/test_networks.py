"""The network and the ways by which it sees a mask: input channels, norms, ControlNets, and two of them."""

import copy

import pytest
import torch
from builders import awake, normal
from builders import unet_numbers as numbers
from monai.networks.nets import ControlNet, DiffusionModelUNet, SPADEDiffusionModelUNet
from torch import nn

from fibldm.errors import FibldmError
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.conditions.mask_encoders import MaskRescaler
from fibldm.models.control import Control
from fibldm.models.denoiser import Denoiser
from fibldm.models.network import ConditionedNetwork, combine_controlnets, steered
from fibldm.models.process import RectifiedFlow

MASK = MaskEncoding((0, 1, 4, 7), 4)


def unet(*, channels: int = 2, **changes: object) -> DiffusionModelUNet:
    torch.manual_seed(1)
    network = DiffusionModelUNet(in_channels=channels, out_channels=channels, **numbers(**changes))
    nn.init.normal_(network.out[2].conv.weight)  # MONAI starts it at 0, where everything is equal
    return network


def controlnet(*, channels: int = 2, mask_channels: int = 5, **changes: object) -> ControlNet:
    torch.manual_seed(2)
    return ControlNet(
        in_channels=channels,
        conditioning_embedding_in_channels=mask_channels,
        conditioning_embedding_num_channels=(8,),
        **numbers(**changes),
    )


def controlled(**changes: object) -> ConditionedNetwork:
    return steered(ConditionedNetwork(unet()), controlnet(**changes))


def test_a_new_controlnet_changes_nothing_to_the_bit() -> None:
    network = controlled().eval()
    z, t, mask = normal(2, 2, 4, 4, 4), torch.tensor([3.0, 700.0]), torch.rand(2, 5, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(network(z, t, {"mask": mask}), unet().eval()(z, t))
        assert torch.equal(network(z, t), unet().eval()(z, t))


def test_a_controlnet_starts_with_the_weights_of_its_base() -> None:
    network = controlled()
    base, own = network.unet.state_dict(), network.controls[0].controlnet.state_dict()
    shared = [name for name in own if not name.startswith("controlnet_")]
    assert {name.split(".")[0] for name in shared} == {"conv_in", "time_embed", "down_blocks", "middle_block"}
    assert all(torch.equal(own[name], base[name]) for name in shared)
    assert all(own[name].data_ptr() != base[name].data_ptr() for name in shared)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": (8, 24)},
        {"channels": (8, 16, 16), "attention_levels": (False, True, True)},
        {"channels": (8,), "attention_levels": (False,)},
        {"num_res_blocks": 2},
        {"attention_levels": (True, True)},
        {"num_head_channels": 16},
        {"norm_num_groups": 8},
    ],
    ids=str,
)
def test_a_controlnet_of_other_numbers_is_refused(changes: dict[str, object]) -> None:
    mask = {"conditioning_embedding_in_channels": 5, "conditioning_embedding_num_channels": (8,)}
    with pytest.raises(FibldmError, match="must be built with the numbers of its base network"):
        steered(ConditionedNetwork(unet()), ControlNet(in_channels=2, **mask, **numbers(**changes)))


@pytest.mark.parametrize("mask_channels", [1, 4, 183])
def test_a_controlnet_takes_as_many_channels_as_the_mask_has(mask_channels: int) -> None:
    network = controlled(mask_channels=mask_channels)
    z, t = normal(1, 2, 4, 4, 4), torch.tensor([500.0])
    assert network(z, t, {"mask": torch.rand(1, mask_channels, 4, 4, 4)}).shape == z.shape
    with pytest.raises(RuntimeError, match=f"to have {mask_channels} channels"):
        network(z, t, {"mask": torch.rand(1, mask_channels + 1, 4, 4, 4)})


def test_only_the_controlnet_learns_above_a_frozen_base() -> None:
    network = controlled()
    control = network.controls[0].controlnet
    for part in (control.controlnet_mid_block, control.controlnet_cond_embedding.conv_out):
        nn.init.normal_(next(part.parameters()))  # past the zeros it starts with, where most gradients are 0
    network(normal(1, 2, 4, 4, 4), torch.tensor([500.0]), {"mask": torch.rand(1, 5, 4, 4, 4)}).square().sum().backward()
    assert all(weight.grad is None for weight in network.unet.parameters())
    assert all(weight.grad is not None for weight in network.controls[0].controlnet.parameters())
    gradient = network.controls[0].controlnet.controlnet_cond_embedding.conv_in.conv.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0


def test_a_base_network_of_another_number_of_channels_says_how_many_it_must_take() -> None:
    network = ConditionedNetwork(unet(channels=7))
    with pytest.raises(FibldmError, match="must take 2 channels, the 2 of the latent; its in_channels is 7") as raised:
        network(normal(1, 2, 4, 4, 4), torch.zeros(1))
    assert "unet::in_channels" in raised.value.remedy
    network = ConditionedNetwork(unet(channels=7), channels={"mask": nn.Identity()})
    with pytest.raises(FibldmError, match="must take 6 channels, the 2 of the latent and the 4 of the mask; .* is 7"):
        network(normal(1, 2, 4, 4, 4), torch.zeros(1), {"mask": normal(1, 4, 4, 4, 4)})


def test_the_network_says_what_its_latent_must_be_divisible_by() -> None:
    network = ConditionedNetwork(unet())
    assert network.multiple == 2
    with pytest.raises(FibldmError, match=r"latent size \(4, 3, 4\) must be divisible by 2 \(2\^1: 2 UNet levels\)"):
        network(normal(2, 2, 4, 3, 4), torch.tensor([0.0, 1.0]))


# --- other ways in

Z, T = normal(2, 2, 4, 4, 4), torch.tensor([3.0, 700.0])
FRACTIONS = torch.rand(2, MASK.channels, 4, 4, 4, generator=torch.Generator().manual_seed(5))
GIVEN = {"mask": FRACTIONS}


def concat_network(channels: int = MASK.channels, encoder: nn.Module | None = None) -> ConditionedNetwork:
    torch.manual_seed(1)
    network = DiffusionModelUNet(in_channels=2 + channels, out_channels=2, **numbers())  # type: ignore[arg-type]
    nn.init.normal_(network.out[2].conv.weight)
    return ConditionedNetwork(network, channels={"mask": encoder or nn.Identity()})


def spade_network() -> ConditionedNetwork:
    torch.manual_seed(1)
    norms = {"label_nc": MASK.channels, "spade_intermediate_channels": 8}
    network = SPADEDiffusionModelUNet(in_channels=2, out_channels=2, **norms, **numbers())
    return ConditionedNetwork(awake(network), norms={"mask": nn.Identity()})


def test_a_concatenated_mask_comes_behind_the_latent() -> None:
    network = concat_network().eval()
    with torch.no_grad():
        assert torch.equal(network(Z, T, GIVEN), network.unet(torch.cat([Z, FRACTIONS], dim=1), T))


@pytest.mark.parametrize("make", [concat_network, spade_network])
def test_a_base_network_that_knows_the_mask_needs_one(make: type[ConditionedNetwork]) -> None:
    network = make().eval()
    assert network.sees_mask
    with pytest.raises(FibldmError, match="this base network needs the mask; got none"):
        network(Z, T)
    with torch.no_grad():
        asked, unasked = network(Z, T, GIVEN), network(Z, T, {"mask": MASK.null(FRACTIONS)})
    assert float((asked - unasked).abs().max()) > 1e-3


@pytest.mark.parametrize("make", [concat_network, spade_network])
def test_a_controlnet_on_top_of_another_way_starts_as_nothing(make: type[ConditionedNetwork]) -> None:
    """Both of two; what the base network has learned of the mask stays as it is."""
    base = make().eval()
    with torch.no_grad():
        before = base(Z, T, GIVEN)
    control = controlnet(channels=base.unet.conv_in.conv.in_channels)
    network = steered(base, control).eval()
    with torch.no_grad():
        assert torch.equal(network(Z, T, GIVEN), before)
    assert not any(weight.requires_grad for weight in network.unet.parameters())
    nn.init.normal_(control.controlnet_mid_block.conv.weight)
    with torch.no_grad():
        assert float((network(Z, T, GIVEN) - before).abs().max()) > 1e-3


def test_a_learned_encoder_belongs_to_the_network() -> None:
    """It gets gradients, and is part of the state dict and so of checkpoint and average."""
    network = concat_network(3, MaskRescaler(MASK, 3))
    network(Z, T, GIVEN).square().sum().backward()
    assert network.mask_encoder is not None
    assert all(weight.grad is not None and weight.grad.any() for weight in network.mask_encoder.parameters())
    assert "mask_encoder.mix.weight" in network.state_dict()


def test_spade_sees_where_a_label_is() -> None:
    """Moving the mask by one cell moves the answer's difference there, too."""
    network = spade_network().eval()
    one, two = (MASK.null(FRACTIONS) for _ in range(2))
    one[:, :, :2, :, :], two[:, :, 2:, :, :] = FRACTIONS[:, :, :2], FRACTIONS[:, :, 2:]
    with torch.no_grad():
        assert float((network(Z, T, {"mask": one}) - network(Z, T, {"mask": two})).abs().max()) > 1e-3


# --- several ControlNets


def trained(seed: int, labels: tuple[int, ...] | None = None) -> ConditionedNetwork:
    """On the same base network, with outputs of its own."""
    network = steered(ConditionedNetwork(unet()), controlnet(), mask=MASK, labels=labels)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.controls[0].named_parameters():
        if "controlnet_down" in name or "controlnet_mid" in name:
            nn.init.normal_(weight, std=0.3, generator=generator)
    return network.eval()


def test_strengths_scale_the_residuals_of_each_controlnet() -> None:
    """0 is the base network, 1 the ControlNet alone, and the order does not matter."""
    one, two = trained(1), trained(2)
    with torch.no_grad():
        alone = one(Z, T, GIVEN)
        assert torch.equal(combine_controlnets([one], [1])(Z, T, GIVEN), alone)
        assert torch.equal(combine_controlnets([one, two], [1, 0])(Z, T, GIVEN), alone)
        torch.testing.assert_close(
            combine_controlnets([one, two], [0, 0])(Z, T, GIVEN), ConditionedNetwork(unet())(Z, T)
        )
        both = combine_controlnets([one, two], [0.5, 2.0])
        torch.testing.assert_close(both(Z, T, GIVEN), combine_controlnets([two, one], [2.0, 0.5])(Z, T, GIVEN))
        x, steps = Z, T
        parts = [control(x, steps, {"mask": FRACTIONS}) for control in both.controls]
        down = [0.5 * first + 2.0 * second for first, second in zip(parts[0][0], parts[1][0], strict=True)]
        expected = both.unet(
            x,
            steps,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=0.5 * parts[0][1] + 2.0 * parts[1][1],
        )
        torch.testing.assert_close(both(Z, T, GIVEN), expected)


def test_controlnets_of_different_base_networks_do_not_join() -> None:
    other = trained(2)
    with torch.no_grad():
        other.unet.out[2].conv.weight += 1e-3
    with pytest.raises(FibldmError, match="only where they were trained on the same base network"):
        combine_controlnets([trained(1), other], [1, 1])
    base = concat_network(3, MaskRescaler(MASK, 3))
    seeing = [steered(copy.deepcopy(base), controlnet(channels=5)) for _ in range(2)]
    combine_controlnets(seeing, [1, 1])
    with torch.no_grad():
        seeing[1].mask_encoder.mix.weight += 1e-3
    with pytest.raises(FibldmError, match="only where they were trained on the same base network"):
        combine_controlnets(seeing, [1, 1])
    with pytest.raises(FibldmError, match="every ControlNet needs one strength; got 1 for 2"):
        combine_controlnets([trained(1), trained(2)], [1])


def test_a_controlnet_may_see_some_labels_only() -> None:
    """The others are unknown to it, so that where they lie changes nothing."""
    network = trained(1, labels=(4,))
    without = MASK.drop(FRACTIONS, MASK.all_but([4]).expand(2, -1))
    with torch.no_grad():
        assert torch.equal(network(Z, T, GIVEN), network(Z, T, {"mask": without}))
        assert not torch.equal(network(Z, T, GIVEN), trained(1)(Z, T, GIVEN))


# --- two dimensions


def test_a_2d_network_takes_volumes_of_one_voxel_along_z() -> None:
    base = ConditionedNetwork(unet(spatial_dims=2)).eval()
    network = steered(base, controlnet(spatial_dims=2)).eval()
    z, mask = normal(2, 2, 4, 8, 1), torch.rand(2, 5, 4, 8, 1)
    with torch.no_grad():
        assert torch.equal(network(z, T, {"mask": mask}), network.unet(z[..., 0], T)[..., None])
    with pytest.raises(FibldmError, match=r"takes single slices \(X, Y, 1\); got the size \(4, 4, 4\)"):
        network(Z, T)


def test_a_control_alone_takes_the_mask_as_it_is_encoded() -> None:
    control = Control(controlnet()).eval()
    with torch.no_grad():
        down, middle = control(Z, T, {"mask": FRACTIONS})
        other_down, other_middle = control.controlnet(Z, T, controlnet_cond=FRACTIONS)
    assert torch.equal(middle, other_middle)
    assert all(torch.equal(one, two) for one, two in zip(down, other_down, strict=True))


# --- denoiser


def test_a_denoiser_turns_the_output_into_the_latent() -> None:
    """Rectified flow: ``z_0 = z_t - t (eps - z_0)``, with the network's time of 1000 t."""
    network = ConditionedNetwork(unet()).eval()
    z_t, t = normal(2, 2, 4, 4, 4), torch.tensor([0.25, 0.75])
    with torch.no_grad():
        flow = network(z_t, 1000 * t)
        made = Denoiser(network, RectifiedFlow(), "flow")(z_t, t)
    torch.testing.assert_close(made.z_0, z_t - t.view(2, 1, 1, 1, 1) * flow)
