"""What a run that adapts the network of another one must take from there: the scale of latents, and covariates."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.manifest import check_manifest
from fibldm.models.conditions.covariates import Categorical, CovariateEncoding, Numeric
from fibldm.models.latents import LatentSpace
from fibldm.runs import load_facts
from fibldm.runs.renamed import current_generator
from fibldm.runs.stage_folder import StageFolder
from fibldm.runs.stages import begun

_GENERATOR = Path("configs") / "generator.json"


def facts_of_base(source: str | Path, autoencoder: str) -> dict[str, Any]:
    """``space`` of the latents and, where its network knows covariates, ``fitted``: their kinds as they were fitted.

    Args:
        source: a run whose latents are made, or the folder of a bundle.
        autoencoder: fingerprint of the one that is used, which must be that of the base.

    Raises:
        FibldmError: it is neither, a bundle changed since its export, or the autoencoder is another one.
    """
    source = Path(source)
    if (source / _GENERATOR).is_file():
        check_manifest(source)
        facts = current_generator(read_json(source / _GENERATOR))
        space, known = facts["space"], (facts["conditions"].get("covariates") or {}).get("kinds", {})
    elif (source / "latents").is_dir():
        space, known = load_facts(source)["space"], _fitted_in(source)
    else:
        raise FibldmError(
            f"latent_space must be a run whose latents are made, or the folder of a bundle; {source} is neither",
            "check the path",
        )
    if space["autoencoder"] != autoencoder:
        raise FibldmError(
            f"latents have the scale of {source} only from its autoencoder ({space['autoencoder'][:12]}); this run has "
            f"another one ({autoencoder[:12]})",
            f"train stage 1 with --config autoencoder_as_given --set init_from={source}, or leave latent_space out",
        )
    return {"space": LatentSpace.from_dict(space).to_dict(), **({"fitted": known} if known else {})}


def covariates_as_fitted(fitted: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> CovariateEncoding:
    """The encoding of covariates that another run fitted.

    Raises:
        FibldmError: it knows others.
    """
    if list(fitted) != list(names):
        raise FibldmError(
            f"covariates must be those of latent_space ({', '.join(fitted)}), in this order; got {', '.join(names)}"
        )
    kinds = {
        name: _kind({key: value for key, value in part.items() if key != "_target_"}) for name, part in fitted.items()
    }
    return CovariateEncoding(kinds)


def _fitted_in(run: Path) -> dict[str, Any]:
    """Of the last stage of a run that knows covariates."""
    for kind in reversed(begun(run)):
        stage = StageFolder(run, kind.name)
        if kind.generates and stage.done() is not None and (encoding := stage.component("covariate_encoding")):
            return {name: asdict(part) for name, part in encoding.kinds.items()}
    return {}


def _kind(part: dict[str, Any]) -> Numeric | Categorical:
    return Categorical(tuple(part["values"])) if "values" in part else Numeric(**part)
