"""Other people's weights as weights and definitions that FibLDM trains on and samples from.

What comes out is compared with what went in: the network of the other program with its own weights and FibLDM's with
the imported ones are fed the same, and must say the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

import fibldm
from fibldm.errors import FibldmError, unknown_choice
from fibldm.files import hash_file, write_json, write_tensors, write_text
from fibldm.importing.architecture import fixed_of, fold, inputs_of, is_maisi
from fibldm.importing.checkpoint import MARKS, Foreign, definitions, described, read_foreign, read_values
from fibldm.importing.conversion import arguments_of, converted, definition_of, layout, parity
from fibldm.licences import licence_notice
from fibldm.manifest import MANIFEST, check_manifest
from fibldm.models.latents import LatentSpace
from fibldm.runs import hash_weights
from fibldm.runs.options import as_options
from fibldm.runs.stages import TABLE
from fibldm.verbatim import as_word, verbatim

TOLERANCE = 1e-4
PREDICTIONS = ("epsilon", "sample", "v", "flow", "rflow")

_SCHEDULERS = ("noise_scheduler", "scheduler")
_MAISI_DDPM = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
# As FibLDM encodes masks, whatever the condition of the other program was.
_MASK_EMBEDDING = {
    "conditioning_embedding_in_channels": "$@mask_encoder.channels",
    "conditioning_embedding_num_channels": "@mask_embedding_channels",
}


@dataclass(frozen=True)
class ImportSettings:
    """What the person who imports knows.

    Attributes:
        licence: SPDX identifier of the weights' licence.
        licence_file: its text; needed for licences that `fibldm.licences` does not know.
        kind: which network of the source; ``auto`` takes all.
        network: JSON or YAML with what the networks were built with, as arguments or as definitions.
        arguments: of the network, beside those of ``network``.
        fixed: values of inputs beside latent, time and context, see `fibldm.importing.architecture`.
        prediction: what the UNet was trained to say; ``rflow`` is the negative of ``flow``, as MONAI's RFlowScheduler
            has it. None: as its bundle says, or as MAISI's are.
        scale_factor: by which latents were multiplied; None: as the checkpoint says.
        trust: run the expressions in definitions of a bundle, and take one whose files changed since its export.
    """

    licence: str
    licence_file: Path | None = None
    kind: str = "auto"
    network: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Sequence[float]] = field(default_factory=dict)
    prediction: str | None = None
    scale_factor: float | None = None
    trust: bool = False


@dataclass(frozen=True)
class Imported:
    """A network of FibLDM, and what it was.

    Attributes:
        part: of the checkpoint.
        configuration: for a stage that goes on from it.
        state: weights by their present names.
        facts: what ``import.json`` says of it.
    """

    part: Foreign
    configuration: dict[str, Any]
    state: dict[str, Tensor]
    facts: dict[str, Any]


def import_weights(source: Path, out: Path, settings: ImportSettings) -> dict[str, Any]:
    """Import every network of a checkpoint or bundle, one to ``out`` itself, several to folders in it.

    Args:
        source: a file of weights, or a folder with such files and, for a bundle, configurations.
        out: gets ``weights.safetensors``, ``network.yaml``, ``import.json``, ``LICENSE``, and ``controlnet.yaml``, a
            configuration for stage 3, where there is a UNet or a ControlNet.
        settings: what the person who imports knows.

    Returns:
        By folder, what ``import.json`` says.

    Raises:
        FibldmError: the licence is not known, the source is refused, is a bundle that changed since its export, or
            holds no such network, something of a network is not known, or it does not say the same afterwards.
    """
    source, out = Path(source), Path(out)
    notice = licence_notice(settings.licence, settings.licence_file)
    if (source / MANIFEST).is_file():
        check_manifest(source, trust=settings.trust)
    parts = _chosen(source, settings)
    said = _said(source, settings)
    imported = [_imported(part, said, settings) for part in parts]
    folders = _folders(out, parts)
    spaces = [_latent_space(each, imported, settings) for each in imported]
    told = {}
    for folder, each, space in zip(folders, imported, spaces, strict=True):
        use = _use(folder, each.part.kind, space)
        told[str(folder)] = {**each.facts, "licence": settings.licence, "latent_space": space, "use": use}
        _write(folder, each, told[str(folder)], notice)
    return told


def _chosen(source: Path, settings: ImportSettings) -> list[Foreign]:
    if settings.kind not in ("auto", *MARKS):
        raise unknown_choice("`kind`", settings.kind, ("auto", *MARKS))
    if settings.prediction not in (None, *PREDICTIONS):
        raise unknown_choice("`prediction`", settings.prediction, PREDICTIONS)
    found = read_foreign(source)
    chosen = [part for part in found if settings.kind in ("auto", part.kind)]
    if not chosen:
        there = ", ".join(sorted({part.kind for part in found}))
        raise FibldmError(f"{source} must hold a network of the kind {settings.kind}; it holds {there}")
    known = {name for part in chosen for name in inputs_of(part.weights)}
    if strange := [name for name in settings.fixed if name not in known]:
        listed = ", ".join(sorted(known)) or "nothing beside latent, time and context"
        raise FibldmError(f"`fixed` must name an input of the network, which asks for {listed}; got {strange[0]!r}")
    return chosen


def _folders(out: Path, parts: Sequence[Foreign]) -> list[Path]:
    if len(parts) == 1:
        return [out]
    kinds = [part.kind for part in parts]
    return [out / (part.kind if kinds.count(part.kind) == 1 else f"{part.kind}_{part.file.stem}") for part in parts]


def _said(source: Path, settings: ImportSettings) -> dict[str, Any]:
    """What is known of networks by the bundle's configurations and by --network."""
    said = definitions(source) if source.is_dir() else {}
    if settings.network is None:
        return said
    given = read_values(settings.network)
    if not isinstance(given, dict):
        raise FibldmError(f"`network` must hold arguments or definitions by name; got a {type(given).__name__}")
    return {**said, **given}


def _imported(part: Foreign, said: Mapping[str, Any], settings: ImportSettings) -> Imported:
    arguments = arguments_of(part, said, settings.arguments, trust=settings.trust)
    fixed = fixed_of(part.weights, settings.fixed)
    prediction, process = _trained_for(part, said, settings)
    definition = definition_of(part, arguments)
    network, state, mapped = converted(part, definition, fold(part.weights, fixed))
    against, difference = parity(part, arguments, network, fixed)
    if not difference <= TOLERANCE:
        raise FibldmError(
            f"{part.kind} of {part.file} must say the same as {against}, to {TOLERANCE:g} of the largest value; "
            f"it differs by {difference:.2g}",
            "give what it was built with by `network`",
        )
    if prediction == "rflow":  # it says ``z_0 - eps``, as MONAI's RFlowScheduler wants it; FibLDM ``eps - z_0``
        state |= {name: -state[name] for name in ("unet.out.2.conv.weight", "unet.out.2.conv.bias")}
    facts = {
        "fibldm": fibldm.__version__,
        "kind": part.kind,
        "format": layout(part),
        "source": {"file": part.file.name, "sha256": hash_file(part.file), "place": part.place},
        "arguments": arguments,
        "fixed": {name: list(value) for name, value in fixed.items()},
        "prediction": prediction,
        "negated": prediction == "rflow",
        **mapped,
        "parity": {"against": against, "largest_difference": difference},
        "notes": list(_notes(part, arguments, prediction)),
    }
    return Imported(part, {**_configuration(part, definition), **process}, state, facts)


def _trained_for(part: Foreign, said: Mapping[str, Any], settings: ImportSettings) -> tuple[str | None, dict[str, Any]]:
    """What a UNet says, and ``target`` and ``process`` of a configuration for it, as far as they are known."""
    scheduler = _scheduler(part, said) if part.kind == "unet" else {}
    prediction = (settings.prediction or _says(scheduler)) if part.kind == "unet" else None
    if prediction in ("flow", "rflow"):
        return prediction, {"target": "flow", "process": {"_target_": "fibldm.models.process.RectifiedFlow"}}
    return prediction, {"target": prediction, **_process(scheduler)} if prediction else {}


def _scheduler(part: Foreign, said: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the UNet was trained with: its bundle's, if there is one UNet in it, or that of MAISI's publications."""
    given = next((said[name] for name in _SCHEDULERS if isinstance(said.get(name), Mapping)), None)
    if given is not None and len(list(described(said, "unet"))) == 1:
        return dict(given)
    if not is_maisi(part.weights):
        return {}
    # the first version is told the body region and is a DDPM, the later ones are not
    return _MAISI_DDPM if "top_region" in inputs_of(part.weights) else {"_target_": "RFlowScheduler"}


def _says(scheduler: Mapping[str, Any]) -> str | None:
    if str(scheduler.get("_target_")).endswith("RFlowScheduler"):
        return "rflow"
    kind = str(scheduler.get("prediction_type", "epsilon")).removesuffix("_prediction") if scheduler else None
    return kind if kind in PREDICTIONS else None


def _process(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """MONAI's schedule as a process of FibLDM, where it is one of plain numbers."""
    schedule = str(scheduler.get("schedule", "linear_beta")).removesuffix("_beta")
    numbers = {
        "steps": scheduler.get("num_train_timesteps", 1000),
        "beta_start": scheduler.get("beta_start", 1e-4),
        "beta_end": scheduler.get("beta_end", 2e-2),
    }
    plain = all(isinstance(value, int | float) for value in numbers.values())
    if not scheduler or schedule not in ("linear", "scaled_linear") or not plain:
        return {}
    return {"process": {"_target_": "fibldm.models.process.VariancePreserving", "schedule": schedule, **numbers}}


def _latent_space(each: Imported, others: Sequence[Imported], settings: ImportSettings) -> dict[str, Any] | None:
    """The space of a UNet's latents where they were multiplied by one factor."""
    scale = settings.scale_factor if settings.scale_factor is not None else each.part.facts.get("scale_factor")
    if each.part.kind != "unet" or scale is None:
        return None
    if not scale > 0:
        raise FibldmError(f"the scale factor of latents must be above 0; got {scale}", "give it by `scale_factor`")
    channels = int(each.facts["arguments"]["out_channels"])
    first = [one for one in others if one.part.kind in ("autoencoder", "vqvae")]
    fingerprint = hash_weights(first[0].state) if len(first) == 1 else ""
    return {"scale_factor": scale, **LatentSpace.constant(scale, channels, fingerprint).to_dict()}


def _configuration(part: Foreign, definition: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that goes behind that of the stage."""
    if part.kind != "unet":
        return {"controlnet" if part.kind == "controlnet" else "network_def": dict(definition)}
    context = {"covariate_width": definition["cross_attention_dim"]} if definition.get("with_conditioning") else {}
    return {"unet": dict(definition), **context}


def _controlnet(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of stage 3: a ControlNet with the numbers of a UNet or ControlNet, for masks of FibLDM."""
    shared = {key: value for key, value in definition.items() if key not in ("out_channels", "dropout_cattn")}
    return {"controlnet": {**shared, "_target_": "monai.networks.nets.ControlNet", **_MASK_EMBEDDING}}


def _notes(part: Foreign, arguments: Mapping[str, Any], prediction: str | None) -> Iterator[str]:
    if part.kind == "vqvae":
        yield "strides and paddings leave no trace in weights: check downsample_parameters and upsample_parameters"
    if part.kind == "unet" and prediction is None:
        yield "what it was trained to say is not known: set target and process, or import again with --prediction"
    if part.kind == "unet":
        yield "a ControlNet on it needs the numbers in controlnet.yaml: give that as --config in stage 3"
    if arguments.get("with_conditioning"):
        yield (
            f"its context is tokens of width {arguments['cross_attention_dim']}: choose covariates for it, whose "
            "tokens are learned anew, and set init_strict=false"
        )
    if part.kind == "controlnet":
        yield (
            f"its condition has {arguments['conditioning_embedding_in_channels']} channels of its own program: set "
            "init_strict=false, and what the mask encoding of FibLDM does not fit is learned anew"
        )


def _write(folder: Path, each: Imported, facts: Mapping[str, Any], notice: str) -> None:
    write_tensors(folder / "weights.safetensors", each.state)
    header = "# Imported by fibldm import-weights; import.json says from what.\n"
    use = f"# {' '.join(facts['use'].splitlines())}\n"
    write_text(folder / "network.yaml", header + use + yaml.safe_dump(each.configuration, sort_keys=False))
    definition = each.configuration.get("unet") or each.configuration.get("controlnet")
    if definition is not None:
        write_text(folder / "controlnet.yaml", header + yaml.safe_dump(_controlnet(definition), sort_keys=False))
    write_text(folder / "LICENSE", notice)
    write_json(folder / "import.json", facts)


def _use(folder: Path, kind: str, space: Mapping[str, Any] | None) -> str:
    file, more = ("controlnet.yaml", {"init_strict": False}) if kind == "controlnet" else ("network.yaml", {})
    scale = "" if space is None else f"fibldm encode with --set latent_scale={space['scale_factor']}, then "
    stage = next(row for row in TABLE.values() if kind in row.imports)
    begun = as_options({"init_from": verbatim(str(folder / "weights.safetensors")), **more})
    return f"{scale}{stage.command} --data WORK --run RUN --config {as_word(folder / file)}{begun}"
