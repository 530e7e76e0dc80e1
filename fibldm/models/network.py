"""The network that Ignite, the checkpoint and the sampler see: a UNet and all that tells it of conditions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast, get_args

import torch
from monai.networks.nets import ControlNet, DiffusionModelUNet, SPADEDiffusionModelUNet
from torch import Tensor, nn

from fibldm.errors import FibldmError, unknown_choice
from fibldm.models.autoencoder import single_slice
from fibldm.models.conditions.condition import Condition, present
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.control import Control, Parts, as_input
from fibldm.models.controlnet import copy_base_weights
from fibldm.models.process import Variance
from fibldm.models.time_vectors import take_vectors, takes_vectors, time_width

# What these two are called in checkpoints, which are older than the others.
_KEPT_AS = {"mask": "mask_encoder", "covariates": "covariate_tokens"}


class ConditionedNetwork(nn.Module):
    """A denoising UNet that may know conditions: each by name, and by one route or several.

    Modules say what it sees of a condition, see `Condition`; None is a condition that it does not see.

    Args:
        unet: the base network.
        controls: ControlNets, see `steered`.
        channels: what comes as further input channels of the base network, behind those of the latent.
        norms: what its SPADE norms see (Park et al. 2019).
        tokens: what it and the ControlNets see by cross-attention.
        time: what is added to their time embeddings, the sum of all.
        variance: what the second half of its output channels says, where it has learned a variance.

    A 2-D base network sees volumes of one voxel along Z without that axis.

    Attributes:
        routes: names of the conditions that are seen on each route of the base network.
        in_space: names of the conditions that it sees cell by cell: as channels, in norms or by a ControlNet.
        sees: names of all conditions that anything of it looks at.

    Raises:
        FibldmError: the base network has no norms or no cross-attention for what goes there, tokens or vectors have
            another width, a network has a table of classes of its own, or there is no such variance.
    """

    def __init__(
        self,
        unet: DiffusionModelUNet | SPADEDiffusionModelUNet,
        controls: Sequence[Control] = (),
        *,
        channels: Parts | None = None,
        norms: Parts | None = None,
        tokens: Parts | None = None,
        time: Parts | None = None,
        variance: Variance = "free",
    ) -> None:
        super().__init__()
        if variance not in get_args(Variance):
            raise unknown_choice("variance", variance, get_args(Variance))
        self.variance: Variance = variance
        routes = {route: present(parts) for route, parts in (("channels", channels), ("norms", norms))}
        routes |= {"tokens": present(tokens), "time": present(time)}
        _check_routes(unet, routes)
        if routes["time"]:
            for network in (unet, *(control.controlnet for control in controls)):
                take_vectors(network)
        self.unet, self.controls = unet, nn.ModuleList(controls)
        self.strengths = (1.0,) * len(controls)
        self.routes = {route: tuple(parts) for route, parts in routes.items()}
        for route, parts in routes.items():
            for name, part in parts.items():
                self.add_module(_kept_as(name, route), part)
        hints = [name for control in controls for name in control.names]
        self.in_space = frozenset([*self.routes["channels"], *self.routes["norms"], *hints])
        self.sees = self.in_space.union(*self.routes.values())

    @property
    def multiple(self) -> int:
        """What every axis of the latent must be divisible by: the UNet halves it once per level but the last."""
        return int(2 ** (len(self.unet.block_out_channels) - 1))

    @property
    def sees_mask(self) -> bool:
        """Whether anything of it looks at the mask."""
        return "mask" in self.sees

    @property
    def encodings(self) -> dict[str, Condition]:
        """How the conditions are encoded that it sees as tokens or in the time embedding."""
        parts = {**self.parts("tokens"), **self.parts("time")}
        return {name: cast(Condition, part.encoding) for name, part in parts.items()}

    @property
    def context_width(self) -> int | None:
        """Width of the tokens that it sees by cross-attention."""
        return next((cast(int, part.width) for part in self.parts("tokens").values()), None)

    def parts(self, route: str) -> dict[str, nn.Module]:
        """What is seen on a route, by name of the condition."""
        return {name: getattr(self, _kept_as(name, route)) for name in self.routes[route]}

    def forward(self, z_t: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor] | None = None) -> Tensor:
        """The network's output ``(B, C, x, y, z)`` in the terms of its training target.

        Args:
            z_t: noisy latent ``(B, C, x, y, z)``.
            timesteps: ``(B,)``, the process's own network time.
            conditions: encoded, ``(B, ...)`` each, by name. Without that of a ControlNet, its residuals are off;
                without that of tokens or vectors, all of it is unknown.

        Raises:
            FibldmError: an axis of the latent is not divisible by `multiple`, a 2-D network gets more than one slice,
                the base network itself needs a condition and gets none, was built for another number of channels, or
                knows nothing of a condition that it gets.
        """
        given = conditions or {}
        flat = self.unet.conv_in.spatial_dims == 2 and z_t.ndim == 5
        z_t = single_slice(z_t) if flat else z_t
        self._check_size(tuple(z_t.shape[2:]))
        self._check_given(given)
        shown = {
            name: as_input(part, given[name], like=z_t)
            for name, part in {**self.parts("channels"), **self.parts("norms")}.items()
        }
        channels, norms = ([shown[name] for name in self.routes[route]] for route in ("channels", "norms"))
        x = torch.cat([z_t, *channels], dim=1) if channels else z_t
        self._check_channels(z_t.shape[1], x.shape[1])
        context, vectors = self._context(given, len(z_t)), self._vectors(given, len(z_t))
        seg = torch.cat(norms, dim=1) if len(norms) > 1 else next(iter(norms), None)
        seen = {"context": context, "seg": seg, "class_labels": vectors}
        seen = {name: tensor for name, tensor in seen.items() if tensor is not None}
        output: Tensor = self.unet(x, timesteps, **seen, **self._residuals(x, timesteps, given, context, vectors))
        return output.unsqueeze(-1) if flat else output

    def _context(self, given: Mapping[str, Tensor], count: int) -> Tensor | None:
        tokens = [
            part(given[name]) if name in given else cast(Tensor, part.unknown).repeat(count, 1, 1)
            for name, part in self.parts("tokens").items()
        ]
        return torch.cat(tokens, dim=1) if len(tokens) > 1 else next(iter(tokens), None)

    def _vectors(self, given: Mapping[str, Tensor], count: int) -> Tensor | None:
        vectors = [
            part(given[name]) if name in given else cast(Tensor, part.unknown).expand(count, -1)
            for name, part in self.parts("time").items()
        ]
        return torch.stack(vectors).sum(dim=0) if len(vectors) > 1 else next(iter(vectors), None)

    def _residuals(
        self,
        x: Tensor,
        timesteps: Tensor,
        given: Mapping[str, Tensor],
        context: Tensor | None,
        vectors: Tensor | None,
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """The sum of all ControlNets' residuals, each times its strength (Zhang et al. 2023, section 3.4)."""
        down: tuple[Tensor, ...] = ()
        middle = x.new_zeros(())
        for control, strength in zip(self.controls, self.strengths, strict=True):
            if cast(Control, control).is_off(given):
                continue
            of_down, of_middle = control(x, timesteps, given, context, vectors)
            if strength != 1:
                of_down, of_middle = tuple(strength * part for part in of_down), strength * of_middle
            down = tuple(one + two for one, two in zip(down, of_down, strict=True)) if down else of_down
            middle = middle + of_middle
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle} if down else {}

    def _check_given(self, given: Mapping[str, Tensor]) -> None:
        if unknown := [name for name in given if name not in self.sees]:
            raise FibldmError(f"this network knows no {', '.join(unknown)}; got some", "leave it out")
        needed = (*self.routes["channels"], *self.routes["norms"])
        if missing := [name for name in needed if name not in given]:
            raise FibldmError(
                f"this base network needs the {', '.join(missing)}; got none", "give Condition.null to ask for nothing"
            )

    def _check_channels(self, latent: int, given: int) -> None:
        if self.unet.in_channels != given:
            more = f" and the {given - latent} of the {', '.join(self.routes['channels'])}" if given > latent else ""
            raise FibldmError(
                f"the base network must take {given} channels, the {latent} of the latent{more}; its in_channels is "
                f"{self.unet.in_channels}",
                "leave unet::in_channels as it is; --config boxes comes after --config image",
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
    sees: str = "mask",
    encoder: nn.Module | None = None,
    mask: MaskEncoding | None = None,
    labels: Iterable[int] | None = None,
    beside: Parts | None = None,
    conditions: Mapping[str, Condition | None] | None = None,
    variance: Variance = "free",
) -> ConditionedNetwork:
    """A trained base network, frozen, with a ControlNet that starts as a copy of its encoder and changes nothing yet.

    Args:
        base: of stage 2; frozen in place, with all that it knows of conditions already.
        controlnet: built with the numbers of the base network.
        sees: name of the condition that steers it.
        encoder: see `Control`, as are ``mask``, ``labels`` and ``beside``.
        conditions: what training shows; of what nobody steers, it must be what the base network knows.
        variance: what training takes the learned variance for, where there is one; that of the base network.

    Raises:
        FibldmError: the two networks were not built with the same numbers, or for other conditions, or the dataset has
            no such label, or the base network has learned another variance.
    """
    if variance != base.variance:
        raise FibldmError(
            f"a ControlNet must learn the variance of its base network, {base.variance}; got {variance}",
            "put configuration learned_variance_vlb after both stages 2 and 3, or after neither",
        )
    known, seen = base.encodings, base.sees | {sees, *present(beside)}
    shown = {name: part for name, part in present(conditions).items() if name in known or name not in seen}
    if shown != known:
        ours, theirs = ({name: list(part.parts) for name, part in parts.items()} for parts in (shown, known))
        wanted = {**dict.fromkeys(ours, []), **theirs}
        raise FibldmError(
            f"a ControlNet must see the conditions of its base network, {theirs}, encoded in the same way; got {ours}",
            f"set {', '.join(f'{name} to {parts}' for name, parts in wanted.items())}, and what decides how they are "
            "encoded as in stage 2",
        )
    base.requires_grad_(False)
    if base.routes["time"]:
        take_vectors(controlnet)
    copied = copy_base_weights(controlnet, base.unet)
    control = Control(copied, sees=sees, encoder=encoder, mask=mask, labels=labels, beside=beside)
    return _with_controls(base, [*base.controls, control])


def combine_controlnets(networks: Sequence[ConditionedNetwork], strengths: Sequence[float]) -> ConditionedNetwork:
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
    network = _with_controls(first, [control for part in networks for control in part.controls])
    network.strengths = tuple(
        float(strength) for part, strength in zip(networks, strengths, strict=True) for _ in part.controls
    )
    return network.train(first.training)


def _same_base(one: ConditionedNetwork, two: ConditionedNetwork) -> bool:
    first, second = _base_weights(one), _base_weights(two)
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    alike = one.routes == two.routes and one.variance == two.variance
    return same and alike and one.encodings == two.encodings


def _base_weights(network: ConditionedNetwork) -> dict[str, Tensor]:
    return {name: weight for name, weight in network.state_dict().items() if not name.startswith("controls.")}


def _with_controls(base: ConditionedNetwork, controls: Sequence[nn.Module]) -> ConditionedNetwork:
    parts = {route: base.parts(route) for route in base.routes}
    return ConditionedNetwork(
        base.unet, [cast(Control, control) for control in controls], variance=base.variance, **parts
    )


def _check_routes(unet: nn.Module, routes: Mapping[str, Mapping[str, nn.Module]]) -> None:
    norms, tokens = routes["norms"], routes["tokens"]
    if bool(norms) != isinstance(unet, SPADEDiffusionModelUNet):
        raise FibldmError(
            f"a base network has SPADE norms where conditions are seen in them; got {type(unet).__name__} and "
            f"{', '.join(norms) or 'none'}",
            "change unet::_target_, or the norms of the network",
        )
    if tokens and not unet.with_conditioning:
        raise FibldmError(
            f"{', '.join(tokens)} need a base network with cross-attention; this one has none",
            "set unet::with_conditioning to true and unet::cross_attention_dim to their width (covariate_width)",
        )
    widths = {name: part.width for name, part in tokens.items()}
    if len(set(widths.values())) > 1:
        raise FibldmError(f"all tokens must have one width, unet::cross_attention_dim; got {widths}")
    widths = {name: part.width for name, part in routes["time"].items()}
    if set(widths.values()) - {time_width(unet)}:
        raise FibldmError(
            f"vectors must have the width of the time embedding, {time_width(unet)}, four times the first of "
            f"unet_channels; got {widths}"
        )
    if unet.num_class_embeds is not None and not (routes["time"] and takes_vectors(unet)):
        raise FibldmError(
            f"a base network must have no table of classes of its own; it has {unet.num_class_embeds} classes",
            "leave unet::num_class_embeds out; a class is a covariate, see covariates_in_time.yaml",
        )


def _kept_as(name: str, route: str) -> str:
    if route == "time":
        return f"vectors_{name}"
    return _KEPT_AS.get(name, f"condition_{name}")
