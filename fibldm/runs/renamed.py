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
CLASSES = {"fibldm.training.latents.EncodeStage": "fibldm.training.encode_stage.EncodeStage"}

_DEEPEST = 40  # beyond, nothing is read: a definition from elsewhere may be of any depth
_LATENT_BATCH = "fibldm.training.prepare_batch.LatentPrepareBatch"
# What a network saw, as configurations said it for it alone, and as they say it now for all stages.
_BY_WAY = ("$@mask_way == 'concat'", "$@mask_encoder if @mask_way else None")
_ROUTES = {
    "channels": {"mask": "$@mask_encoder if @mask_way == 'concat' else None"},
    "norms": {"mask": "$@mask_encoder if @mask_way == 'spade' else None"},
    "tokens": {"covariates": "@covariate_tokens"},
}
_TIME = {"covariates": None}  # a route that is younger than the others


def current(config: Any, depth: int = 0) -> Any:
    """A copy of a configuration, or of a part of it, with today's names; one of today stays as it is."""
    if isinstance(config, list) and depth < _DEEPEST:
        return [current(part, depth + 1) for part in config]
    if not isinstance(config, Mapping) or depth == _DEEPEST:
        return config
    made = {key: current(part, depth + 1) for key, part in config.items()}
    if isinstance(target := made.get("_target_"), str):
        module, _, name = target.rpartition(".")
        made["_target_"] = f"{MODULES[module]}.{name}" if module in MODULES else CLASSES.get(target, target)
        made = _ARGUMENTS.get(target, dict)(made)
    return _with_conditions(made)


def current_generator(facts: Mapping[str, Any]) -> dict[str, Any]:
    """``generator.json`` in today's format; format 1 had the mask by itself, and covariates in the network only."""
    made: dict[str, Any] = current(facts)
    if made.get("format") == 1:
        tokens = (_at(made, "network", *base, "tokens", "covariates", "encoding") for base in ((), ("base",)))
        covariates = next(filter(None, tokens), None)
        mask = {"conditions": {"mask": made.pop("mask"), "covariates": covariates}} if "mask" in made else {}
        made |= {"format": 2, **mask}
    return made


def _at(part: Any, *path: str) -> Any:
    for key in path:
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def _network(made: dict[str, Any]) -> dict[str, Any]:
    if "concat" not in made and "mask_encoder" not in made and "covariate_tokens" not in made:
        is_by_route = made.get("tokens") == "@routes::tokens"
        return {**made, "time": "@routes::time"} if is_by_route and "time" not in made else made
    concat, encoder = made.pop("concat", False), made.pop("mask_encoder", None)
    tokens = made.pop("covariate_tokens", None)
    known = {"tokens": "@routes::tokens" if tokens == "@covariate_tokens" else {"covariates": tokens}}
    if (concat, encoder) == _BY_WAY:
        named = {route: f"@routes::{route}" for route in ("channels", "norms", "time")}
        return {**made, **named, **known}
    spade = str(_at(made, "unet", "_target_")).endswith("SPADEDiffusionModelUNet")
    channels, norms = ({"mask": encoder if seen else None} for seen in (concat, spade))
    return {**made, "channels": channels, "norms": norms, **known}


def _of_mask_and_covariates(made: dict[str, Any]) -> dict[str, Any]:
    if "mask" not in made and "covariates" not in made:
        return made
    conditions = {"mask": made.pop("mask", None), "covariates": made.pop("covariates", None)}
    return {**made, "conditions": conditions}


def _latent_batch(made: dict[str, Any]) -> dict[str, Any]:
    dropout: dict[str, Any] = {}
    if "label_dropout" in made or "mask_dropout" in made:
        dropout["mask"] = {"each": made.pop("label_dropout", 0.0), "all": made.pop("mask_dropout", 0.0)}
    if "covariate_dropout" in made:
        dropout["covariates"] = made.pop("covariate_dropout")
    return _of_mask_and_covariates(made) | ({"dropout": dropout} if dropout else {})


def _steered(made: dict[str, Any]) -> dict[str, Any]:
    if "covariates" not in made:
        return made
    conditions = {"covariates": made.pop("covariates")}
    return {**made, "conditions": conditions}


_ARGUMENTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "fibldm.models.network.ConditionedNetwork": _network,
    "fibldm.models.network.steered": _steered,
    "fibldm.training.latents.LoadLatent": _of_mask_and_covariates,
    _LATENT_BATCH: _latent_batch,
}


def _with_conditions(made: dict[str, Any]) -> dict[str, Any]:
    """A stage's configuration with its conditions in one place, to which all that needs them refers."""
    if _at(made, "train", "prepare_batch", "_target_") != _LATENT_BATCH:
        return made
    if "conditions" in made:
        return (
            {**made, "routes": {"time": _TIME, **made["routes"]}} if isinstance(made.get("routes"), Mapping) else made
        )
    shown = made["train"]["prepare_batch"].get("conditions", {})
    loaded, steering = {**shown, "mask": "@mask"}, {"covariates": shown.get("covariates")}
    return {**_referring(made, (shown, loaded, steering)), "conditions": shown, "routes": {**_ROUTES, "time": _TIME}}


def _referring(part: Any, those: tuple[Any, ...]) -> Any:
    if isinstance(part, list):
        return [_referring(value, those) for value in part]
    if not isinstance(part, Mapping):
        return part
    return {
        key: "@conditions" if key == "conditions" and value in those else _referring(value, those)
        for key, value in part.items()
    }
