"""The network that Ignite, the checkpoint and the sampler see: a UNet and all that tells it of mask and covariates."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from monai.networks.nets import ControlNet, DiffusionModelUNet, SPADEDiffusionModelUNet
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import single_slice
from fibldm.models.conditioning import MaskEncoding
from fibldm.models.controlnet import copy_base_weights
from fibldm.models.covariates import CovariateEncoding, CovariateTokens
from fibldm.models.transfer import to_device

Residuals = tuple[tuple[Tensor, ...], Tensor]


class MaskControl(nn.Module):
    """A ControlNet and what it sees of the mask.

    Args:
        controlnet: steered by this.
        encoder: from the encoded mask to the condition, see `mask_encoders`; None shows the mask as it is encoded.
        mask: how masks are encoded; needed with ``labels`` only.
        labels: values of the labels that it sees, the others are unknown to it; None: all.

    Raises:
        FibldmError: the dataset has no such label.
    """

    dropped: Tensor | None

    def __init__(
        self,
        controlnet: ControlNet,
        *,
        encoder: nn.Module | None = None,
        mask: MaskEncoding | None = None,
        labels: Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        self.controlnet, self.encoder, self.mask = controlnet, encoder, mask
        dropped = mask.all_but(labels) if mask is not None and labels is not None else None
        self.register_buffer("dropped", dropped, persistent=False)

    def forward(self, x: Tensor, timesteps: Tensor, mask: Tensor, context: Tensor | None = None) -> Residuals:
        """Residuals of the down path, and of the middle, for the base network's own input ``(B, N, x, y, z)``."""
        if self.mask is not None and self.dropped is not None:
            mask = self.mask.drop_labels(mask, self.dropped.expand(len(mask), -1))
        down, middle = self.controlnet(
            x, timesteps, controlnet_cond=_shown(self.encoder, mask, like=x), context=context
        )
        return tuple(down), middle


class ConditionedNetwork(nn.Module):
    """A denoising UNet that may know the mask: as input channels, in its norms (SPADE), by ControlNets, or by several.

    Args:
        unet: the base network; one with SPADE norms sees the mask in them (Park et al. 2019).
        controls: ControlNets, see `steered`.
        concat: the mask comes as further input channels of the base network, behind those of the latent.
        mask_encoder: what the base network sees of the mask, see `mask_encoders`; None shows it as it is encoded.
        covariate_tokens: what the base network and the ControlNets see of covariates, by cross-attention.

    A 2-D base network sees volumes of one voxel along Z without that axis.

    Raises:
        FibldmError: there are covariates, and the base network has no cross-attention.
    """

    def __init__(
        self,
        unet: DiffusionModelUNet | SPADEDiffusionModelUNet,
        controls: Sequence[MaskControl] = (),
        *,
        concat: bool = False,
        mask_encoder: nn.Module | None = None,
        covariate_tokens: CovariateTokens | None = None,
    ) -> None:
        super().__init__()
        if covariate_tokens is not None and not unet.with_conditioning:
            raise FibldmError(
                "covariates need a base network with cross-attention; this one has none",
                "set unet::with_conditioning to true and unet::cross_attention_dim to covariate_width",
            )
        self.unet, self.controls = unet, nn.ModuleList(controls)
        self.strengths = (1.0,) * len(controls)
        self.concat, self.spade = concat, isinstance(unet, SPADEDiffusionModelUNet)
        self.mask_encoder, self.covariate_tokens = mask_encoder, covariate_tokens

    @property
    def multiple(self) -> int:
        """What every axis of the latent must be divisible by: the UNet halves it once per level but the last."""
        return int(2 ** (len(self.unet.block_out_channels) - 1))

    @property
    def sees_mask(self) -> bool:
        """Whether anything of it looks at the mask."""
        return self.concat or self.spade or len(self.controls) > 0

    @property
    def covariates(self) -> CovariateEncoding | None:
        """How the covariates are encoded that it knows."""
        return None if self.covariate_tokens is None else self.covariate_tokens.encoding

    @property
    def context_width(self) -> int | None:
        """Width of the tokens that it sees by cross-attention."""
        return None if self.covariate_tokens is None else self.covariate_tokens.width

    def forward(
        self, z_t: Tensor, timesteps: Tensor, mask: Tensor | None = None, covariates: Tensor | None = None
    ) -> Tensor:
        """The network's output ``(B, C, x, y, z)`` in the terms of its training target.

        Args:
            z_t: noisy latent ``(B, C, x, y, z)``.
            timesteps: ``(B,)``, the process's own network time.
            mask: encoded mask ``(B, M, x, y, z)``; None turns the ControlNets' residuals off.
            covariates: encoded, ``(B, T, 2)``; None: all unknown.

        Raises:
            FibldmError: an axis of the latent is not divisible by `multiple`, a 2-D network gets more than one slice,
                the base network itself needs a mask and gets none, was built for another number of channels, or knows
                no covariates and gets some.
        """
        flat = self.unet.conv_in.spatial_dims == 2 and z_t.ndim == 5
        z_t = single_slice(z_t) if flat else z_t
        self._check_size(tuple(z_t.shape[2:]))
        if mask is None and (self.concat or self.spade):
            raise FibldmError("this base network needs the mask; got none", "give MaskEncoding.null to ask for nothing")
        shown = _shown(self.mask_encoder, mask, like=z_t) if self.concat or self.spade else None
        x = torch.cat([z_t, shown], dim=1) if self.concat and shown is not None else z_t
        self._check_channels(z_t.shape[1], x.shape[1])
        context = self._context(covariates, like=z_t)
        residuals = {} if mask is None or not self.controls else self._residuals(x, timesteps, mask, context)
        seen = {"context": context, "seg": shown if self.spade else None}
        given = {name: tensor for name, tensor in seen.items() if tensor is not None}
        output: Tensor = self.unet(x, timesteps, **given, **residuals)
        return output.unsqueeze(-1) if flat else output

    def _context(self, covariates: Tensor | None, *, like: Tensor) -> Tensor | None:
        if self.covariate_tokens is None:
            if covariates is not None:
                raise FibldmError("this network knows no covariates; got some", "leave them out")
            return None
        if covariates is None:
            covariates = to_device(self.covariate_tokens.encoding.null(len(like)), like.device)
        context: Tensor = self.covariate_tokens(covariates)
        return context

    def _residuals(
        self, x: Tensor, timesteps: Tensor, mask: Tensor, context: Tensor | None
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """The sum of all ControlNets' residuals, each times its strength (Zhang et al. 2023, section 3.4)."""
        down: tuple[Tensor, ...] = ()
        middle = x.new_zeros(())
        for control, strength in zip(self.controls, self.strengths, strict=True):
            of_down, of_middle = control(x, timesteps, mask, context)
            if strength != 1:
                of_down, of_middle = tuple(strength * part for part in of_down), strength * of_middle
            down = tuple(one + two for one, two in zip(down, of_down, strict=True)) if down else of_down
            middle = middle + of_middle
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def _check_channels(self, latent: int, given: int) -> None:
        if self.unet.in_channels != given:
            mask = f" and the {given - latent} of the mask" if given > latent else ""
            raise FibldmError(
                f"the base network must take {given} channels, the {latent} of the latent{mask}; its in_channels is "
                f"{self.unet.in_channels}",
                "leave unet::in_channels as it is",
            )

    def _check_size(self, size: tuple[int, ...]) -> None:
        if any(length % self.multiple for length in size):
            raise FibldmError(
                f"latent size {size} must be divisible by {self.multiple} (2^{len(self.unet.block_out_channels) - 1}: "
                f"{len(self.unet.block_out_channels)} UNet levels)",
                "choose a model grid whose size is divisible by that times the autoencoder's compression",
            )


def steered(
    base: ConditionedNetwork,
    controlnet: ControlNet,
    *,
    encoder: nn.Module | None = None,
    mask: MaskEncoding | None = None,
    labels: Iterable[int] | None = None,
    covariates: CovariateEncoding | None = None,
) -> ConditionedNetwork:
    """A trained base network, frozen, with a ControlNet that starts as a copy of its encoder and changes nothing yet.

    Args:
        base: of stage 2; frozen in place, with all that it knows of mask and covariates already.
        controlnet: built with the numbers of the base network.
        encoder: see `MaskControl`, as are ``mask`` and ``labels``.
        covariates: what training shows of them, which must be what the base network knows.

    Raises:
        FibldmError: the two networks were not built with the same numbers, or for other covariates, or the dataset has
            no such label.
    """
    if covariates != base.covariates:
        ours, theirs = (list(part.kinds) if part is not None else [] for part in (covariates, base.covariates))
        raise FibldmError(
            f"a ControlNet must see the covariates of its base network, {theirs}, encoded in the same way; got {ours}",
            f"set covariates to {theirs}, and covariate_categories to those of its training",
        )
    base.requires_grad_(False)
    control = MaskControl(copy_base_weights(controlnet, base.unet), encoder=encoder, mask=mask, labels=labels)
    return ConditionedNetwork(
        base.unet,
        [*base.controls, control],
        concat=base.concat,
        mask_encoder=base.mask_encoder,
        covariate_tokens=base.covariate_tokens,
    )


def joined(networks: Sequence[ConditionedNetwork], strengths: Sequence[float]) -> ConditionedNetwork:
    """One base network with the ControlNets of several networks that were trained on it.

    Args:
        networks: with one and the same base network, from which the first one's is taken.
        strengths: of the ControlNets of each network; 0 switches them off, 1 is as trained.

    Raises:
        FibldmError: the base networks differ, or there are not as many strengths.
    """
    first = networks[0]
    if len(networks) != len(strengths):
        raise FibldmError(f"every ControlNet needs one strength; got {len(strengths)} for {len(networks)}")
    for other in networks[1:]:
        if not _same_base(first, other):
            raise FibldmError(
                "ControlNets can be joined only where they were trained on the same base network; these were not",
                "train the second ControlNet on a copy of the run of the first",
            )
    network = ConditionedNetwork(
        first.unet,
        [cast(MaskControl, control) for part in networks for control in part.controls],
        concat=first.concat,
        mask_encoder=first.mask_encoder,
        covariate_tokens=first.covariate_tokens,
    )
    network.strengths = tuple(
        float(strength) for part, strength in zip(networks, strengths, strict=True) for _ in part.controls
    )
    return network.train(first.training)


def _same_base(one: ConditionedNetwork, two: ConditionedNetwork) -> bool:
    first, second = _base_weights(one), _base_weights(two)
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return same and one.covariates == two.covariates


def _base_weights(network: ConditionedNetwork) -> dict[str, Tensor]:
    return {name: weight for name, weight in network.state_dict().items() if not name.startswith("controls.")}


def _shown(encoder: nn.Module | None, mask: Tensor | None, *, like: Tensor) -> Tensor:
    """What an encoder makes of a mask, with as many axes as ``like``."""
    shown: Tensor = mask if encoder is None else encoder(mask)  # type: ignore[assignment]
    return shown.squeeze(-1) if shown.ndim > like.ndim else shown
