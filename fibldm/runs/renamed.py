"""Configurations and definitions of earlier versions, in the words of today.

Run folders and bundles keep the names of classes and of their arguments for ever; here they are turned into those that
there are now, wherever such a file is read.
"""

from collections.abc import Callable, Mapping
from typing import Any

MODULES = {
    "fibldm.models.conditioning": "fibldm.models.conditions.mask",
    "fibldm.models.covariates": "fibldm.models.conditions.covariates",
    "fibldm.models.mask_encoders": "fibldm.models.conditions.mask_encoders",
}

_LATENT_BATCH = "fibldm.training.prepare_batch.LatentPrepareBatch"
_WAY = "$@mask_encoder if @mask_way == '{}' else None"  # of configurations, instead of two expressions
_BY_WAY = {"concat": "$@mask_way == 'concat'", "mask_encoder": "$@mask_encoder if @mask_way else None"}


def current(config: Any) -> Any:
    """A copy of a configuration, or of a part of it, with today's names; one of today stays as it is."""
    if isinstance(config, list):
        return [current(part) for part in config]
    if not isinstance(config, Mapping):
        return config
    made = {key: current(part) for key, part in config.items()}
    if isinstance(target := made.get("_target_"), str):
        module, _, name = target.rpartition(".")
        made["_target_"] = f"{MODULES[module]}.{name}" if module in MODULES else target
        made = _ARGUMENTS.get(target, dict)(made)
    return _with_conditions(made)


def current_generator(facts: Mapping[str, Any]) -> dict[str, Any]:
    """``generator.json`` in today's format; format 1 had the mask by itself, and covariates in the network only."""
    made: dict[str, Any] = current(facts)
    if made.get("format") == 1 and "mask" in made:
        network = made.get("network", {})
        tokens = network.get("base", network).get("tokens", {}).get("covariates") or {}
        made |= {"format": 2, "conditions": {"mask": made.pop("mask"), "covariates": tokens.get("encoding")}}
    return made


def _network(made: dict[str, Any]) -> dict[str, Any]:
    if "concat" not in made and "mask_encoder" not in made and "covariate_tokens" not in made:
        return made
    concat, encoder = made.pop("concat", False), made.pop("mask_encoder", None)
    if {"concat": concat, "mask_encoder": encoder} == _BY_WAY:
        made |= {route: {"mask": _WAY.format(way)} for route, way in (("channels", "concat"), ("norms", "spade"))}
    else:
        unet = made["unet"].get("_target_", "") if isinstance(made["unet"], Mapping) else ""
        seen = encoder or {"_target_": "torch.nn.Identity"}
        made |= {"channels": {"mask": seen if concat else None}}
        made |= {"norms": {"mask": seen if unet.endswith("SPADEDiffusionModelUNet") else None}}
    return {**made, "tokens": {"covariates": made.pop("covariate_tokens", None)}}


def _of_mask_and_covariates(made: dict[str, Any]) -> dict[str, Any]:
    if "mask" not in made and "covariates" not in made:
        return made
    return {**made, "conditions": {"mask": made.pop("mask", None), "covariates": made.pop("covariates", None)}}


def _latent_batch(made: dict[str, Any]) -> dict[str, Any]:
    dropout: dict[str, Any] = {}
    if "label_dropout" in made or "mask_dropout" in made:
        dropout["mask"] = {"each": made.pop("label_dropout", 0.0), "all": made.pop("mask_dropout", 0.0)}
    if "covariate_dropout" in made:
        dropout["covariates"] = made.pop("covariate_dropout")
    return _of_mask_and_covariates(made) | ({"dropout": dropout} if dropout else {})


def _steered(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "conditions": {"covariates": made.pop("covariates")}} if "covariates" in made else made


_ARGUMENTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "fibldm.models.network.ConditionedNetwork": _network,
    "fibldm.models.network.steered": _steered,
    "fibldm.training.latents.LoadLatent": _of_mask_and_covariates,
    _LATENT_BATCH: _latent_batch,
}


def _with_conditions(made: dict[str, Any]) -> dict[str, Any]:
    """A stage's configuration with its conditions in one place, to which all that needs them refers."""
    prepare = made.get("train", {}).get("prepare_batch", {}) if isinstance(made.get("train"), Mapping) else {}
    if "conditions" in made or not isinstance(prepare, Mapping) or prepare.get("_target_") != _LATENT_BATCH:
        return made
    shown = prepare.get("conditions", {})
    loaded, steering = {**shown, "mask": "@mask"}, {"covariates": shown.get("covariates")}
    return {**_referring(made, (shown, loaded, steering)), "conditions": shown}


def _referring(part: Any, those: tuple[Any, ...]) -> Any:
    if isinstance(part, list):
        return [_referring(value, those) for value in part]
    if not isinstance(part, Mapping):
        return part
    return {
        key: "@conditions" if key == "conditions" and value in those else _referring(value, those)
        for key, value in part.items()
    }
