"""A bundle as the beginning of a run, whose networks are done, for stages that stand on them."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fibldm.errors import FibldmError
from fibldm.files import atomic_path
from fibldm.runs import StageFolder, hash_weights
from fibldm.synthesis.bundle import open_bundle

_OF_GENERATOR = ("process", "target", "conditions")


def run_of_bundle(bundle: str | Path, run: str | Path, *, trust: bool = False) -> list[Path]:
    """Write autoencoder and network of a bundle as finished stages of a run; its latents are then those of any data.

    Args:
        bundle: its folder or archive.
        run: the run folder, without these stages.
        trust: see `fibldm.synthesis.bundle.open_bundle`.

    Returns:
        The folders of the stages.

    Raises:
        FibldmError: the bundle is refused, is a distilled network or one with ControlNets or tokens, or the run has
            one of the stages.
    """
    folders = [StageFolder(Path(run), name) for name in ("autoencoder", "diffusion")]
    if there := [folder.path for folder in folders if folder.path.exists()]:
        raise FibldmError(f"a bundle begins a new run; {there[0]} is there already", "choose another run folder")
    with open_bundle(bundle, trust=trust) as opened:
        facts = opened.facts
        network = opened.network("network")
        if len(getattr(network, "controls", ())) or "distilled" in facts:
            raise FibldmError(
                f"only a bundle of stage 2 alone begins a run; {bundle} has a ControlNet or was distilled",
                "train on the run that it was exported from",
            )
        for folder, key, made in zip(folders, ("autoencoder", "network"), _networks(opened, network), strict=True):
            config = {"epochs": 0, "network_def": as_configuration(facts[key])}
            _keep(folder, config | (_of_diffusion(facts, network) if key == "network" else {}), made, facts)
    return [folder.path for folder in folders]


def as_configuration(definition: Any) -> Any:
    """A definition as a configuration has it: what is a tuple in a dataclass stays one, as JSON has lists only."""
    if isinstance(definition, list):
        return [as_configuration(part) for part in definition]
    if not isinstance(definition, Mapping):
        return definition
    made = {key: as_configuration(part) for key, part in definition.items()}
    if "_target_" in definition:
        module, _, name = str(definition["_target_"]).rpartition(".")
        if is_dataclass(getattr(import_module(module), name)):
            made |= {key: f"${tuple(part)!r}" for key, part in definition.items() if isinstance(part, list)}
    return made


def _networks(bundle: Any, network: nn.Module) -> tuple[nn.Module, nn.Module]:
    return bundle.network("autoencoder"), network


def _of_diffusion(facts: Mapping[str, Any], network: Any) -> dict[str, Any]:
    """What later stages read of the configuration of stage 2."""
    way = next(
        (way for route, way in (("channels", "concat"), ("norms", "spade")) if "mask" in network.routes[route]), None
    )
    own = {key: as_configuration(facts[key]) for key in _OF_GENERATOR}
    conditions = {"mask": None, "covariates": None, **own.pop("conditions")}
    times = {"_target_": "fibldm.models.timesteps.UniformTimes"}
    shifted = {"_target_": "fibldm.models.timesteps.ShiftedTimes", "times": times, "shift": facts["shift"]}
    return {
        **own,
        "conditions": conditions,
        "mask": conditions["mask"],
        "covariates": [],
        "covariate_encoding": conditions["covariates"],
        "mask_way": way,
        "mask_dropout": facts.get("mask_dropout", 0.0),
        "times": shifted,
    }


def _keep(folder: StageFolder, config: Mapping[str, Any], network: nn.Module, facts: Mapping[str, Any]) -> None:
    """As a stage that had nothing to learn."""
    folder.begin({**config, "not_decisive": []}, {"bundle": f"{facts['name']} {facts['version']}"})
    best: dict[str, Any] = {"model": network.state_dict(), "epoch": 0, "loss": 0.0}
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder.checkpoints / "best.pt") as temporary:
        torch.save(best, temporary)
    folder.finish(epochs=0, stopped_epoch=0, best_epoch=0, validation_loss=0.0, weights=hash_weights(best["model"]))
