"""A run as a bundle: weights, facts and configurations that stand alone, and the words that go with them.

The layout is MONAI's. ``configs/generator.json`` is FibLDM's own description, which is data; the other configurations
are programs for ``python -m monai.bundle run``.
"""

import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fibldm
from fibldm.delivery.configurations import (
    evaluate_configuration,
    inference_configuration,
    metadata,
    train_configuration,
)
from fibldm.delivery.measured import Measured, followed
from fibldm.delivery.model_card import CardText, card
from fibldm.delivery.resolve import literal, plain
from fibldm.errors import FibldmError
from fibldm.files import atomic_folder, hash_file, hash_value, write_json, write_tensors, write_text
from fibldm.licences import licence_notice
from fibldm.locks import alone, beside
from fibldm.manifest import MANIFEST, write_manifest
from fibldm.models.adapters import Adapter
from fibldm.models.conditions.condition import present
from fibldm.models.conditions.token import TOKEN, TokenNames, TokenVectors
from fibldm.models.time_vectors import time_width
from fibldm.runs import StageFolder, hash_weights, load_facts
from fibldm.runs.stages import kind_of, taught
from fibldm.synthesis import SamplingSettings, Synthesizer
from fibldm.synthesis.bundle import FORMAT, GENERATOR
from fibldm.synthesis.definitions import build
from fibldm.synthesis.loading import generating_stage, residual_noise_file
from fibldm.synthesis.student import Student
from fibldm.volumes.gate import read_gate
from fibldm.volumes.label_images import channels_are_labels

PARTS = ("configs", "docs", "models", "LICENSE")
WORDS = "export.yaml"


@dataclass(frozen=True)
class ExportSettings:
    """What the person who exports decides.

    Attributes:
        licence: SPDX identifier of the weights' licence.
        licence_file: its text; needed for licences that `fibldm.licences` does not know.
        half: keep weights in half precision.
        name: of the bundle; by default that of its folder.
        version: of the bundle.
        unconditional: stage 2 of a run, which knows no mask, as a generator whose volumes follow none.
        sampling: fields of `SamplingSettings` for how the bundle draws by default, in place of what was measured.
        adapters: files of updates of low rank that become part of the network's weights, with their strengths.
    """

    licence: str
    licence_file: Path | None = None
    half: bool = False
    name: str | None = None
    version: str = "0.1.0"
    unconditional: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str | Path, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """A bundle that is being written.

    Attributes:
        folder: where its parts lie for now.
        facts: content of its ``generator.json``.
        words: what a person says of it.
        measured: the figures of its weights.
    """

    folder: Path
    facts: Mapping[str, Any]
    words: CardText
    measured: Measured


Also = Callable[[Exported], None]


def export(run: Path, out: Path, settings: ExportSettings, *, also: Also | None = None) -> dict[str, Any]:
    """Write a run as a bundle; what lies in ``out`` beside the parts of a bundle stays there.

    Args:
        run: a finished run.
        out: the bundle's folder; words of ``out/export.yaml`` go into the model card.
        settings: what the person who exports decides.
        also: writes more into the bundle before its manifest.

    Returns:
        ``bytes`` of the weights, ``half``, ``data_licence`` as the dataset says it, ``sampling`` by default, ``notes``
        on the figures, and ``files``.

    Raises:
        FibldmError: the run is not finished or draws masks, an adapter is refused, the licence is not known, the run's
            networks cannot be described, its figures are of several samplings and none is chosen, or another process
            writes the bundle.
    """
    words = CardText.read(out / WORDS)
    notice = licence_notice(settings.licence, settings.licence_file, words.attribution)
    remedy = "wait until that has ended, or choose another `out`"
    with alone(beside(out), str(out), remedy), atomic_folder(out, PARTS) as folder:
        stage = generating_stage(run, unconditional=settings.unconditional)
        _check_drawn(run)
        adapted = _adapted(run, settings)
        measured = _measured(run, stage, adapted)
        student = Student.of_stage(stage)
        usual = measured.default(settings.sampling, SamplingSettings() if student is None else student.own)
        facts = _write_generator(run, folder, settings, out.name, usual, adapted)
        write_text(folder / "LICENSE", notice)
        write_json(folder / "configs" / "metadata.json", metadata(facts, words, measured.figures))
        write_json(folder / "configs" / "inference.json", inference_configuration(facts))
        write_json(folder / "configs" / "train.json", train_configuration(stage, facts))
        write_json(folder / "configs" / "evaluate.json", evaluate_configuration(facts))
        write_text(folder / "docs" / "README.md", card(facts, words, measured, size=_size(folder)))
        if also is not None:
            also(Exported(folder, facts, words, measured))
        written = {
            "bytes": _size(folder),
            "half": settings.half,
            "data_licence": facts["data_licence"],
            "sampling": followed(facts).to_dict(),
            "notes": measured.notes(followed(facts)),
        }
    write_manifest(Path(out))  # last, so that an export that broke off has none, or one that it does not fit
    return {
        **written,
        "files": sorted(str(file.relative_to(out)) for part in (*PARTS, MANIFEST) for file in _files(out / part)),
    }


def _check_drawn(run: Path) -> None:
    if channels_are_labels(load_facts(run)):
        raise FibldmError(
            f"a bundle must draw volumes; {run} draws masks", "give the run folder itself to `fibldm synthesize-masks`"
        )


def _adapted(run: Path, settings: ExportSettings) -> Synthesizer | None:
    """The generator with its adapters; None where there are none."""
    if not settings.adapters:
        return None
    return Synthesizer.from_run(run, unconditional=settings.unconditional, adapters=settings.adapters)


def _measured(run: Path, stage: StageFolder, adapted: Synthesizer | None) -> Measured:
    """The figures of the weights that are exported, perhaps none."""
    network, autoencoder = (part.require()["weights"] for part in (stage, StageFolder(run, "autoencoder")))
    network = network if adapted is None else adapted.source["weights"]
    return Measured.read(run, network=network, autoencoder=autoencoder)


def _write_generator(
    run: Path,
    folder: Path,
    settings: ExportSettings,
    name: str,
    sampling: SamplingSettings,
    adapted: Synthesizer | None,
) -> dict[str, Any]:
    """Weights and ``generator.json``, whose content is returned."""
    known, stage = load_facts(run), generating_stage(run, unconditional=settings.unconditional)
    networks = {"network": stage, "autoencoder": StageFolder(run, "autoencoder")}
    definitions = {key: _definition(part) for key, part in networks.items()}
    token = None if adapted is None else adapted.conditions.get(TOKEN)
    if adapted is not None and isinstance(token, TokenNames):
        definitions["network"] = _knowing(definitions["network"], token, time_width(adapted.network.unet))
    token_defined = {} if token is None else {TOKEN: plain(token, TOKEN)}
    weights: dict[str, Any] = {}
    fingerprints, of_network = {}, {}
    for key, part in networks.items():
        network = adapted.network if adapted and key == "network" else part.trained(device="cpu")
        state = _kept(network, half=settings.half)
        _fits(definitions[key], state, key)
        file = folder / "models" / f"{key}.safetensors"
        write_tensors(file, state)
        weights[key] = {"file": f"models/{file.name}", "sha256": hash_file(file)}
        as_read = {name: state[name].to(tensor.dtype) for name, tensor in network.state_dict().items()}
        fingerprints[key] = hash_weights(as_read)
        if key == "network":
            _write_model(folder / "models" / "model.pt", state)
            conditions = present(stage.component("conditions") if adapted is None else adapted.conditions)
            for kind, condition in conditions.items():
                if condition.fingerprint:
                    condition.write(folder / "models" / kind)
            asked = {kind: condition.facts() for kind, condition in conditions.items()}
            known_of, further = asked.pop("covariates", {}), {key: part for key, part in asked.items() if key != "mask"}
            of_network = {"sees_mask": network.sees_mask, "covariates": known_of}
            of_network |= {"further": further} if further else {}
        else:
            latents = not network.is_identity
    weights["residual_noise"] = _residual_noise(run, folder, known)
    shift = float(getattr(stage.component("times"), "shift", 1.0))
    sampling.as_trained(shift=shift, latents=latents, residual_noise=True)  # refuses what cannot be drawn
    if sampling.shift == shift:
        sampling = replace(sampling, shift=None)  # as it is asked for, so that volumes of before are not made anew
    if weights["residual_noise"] is None:
        sampling = replace(sampling, residual_noise=SamplingSettings.residual_noise)
    if (student := Student.of_stage(stage)) is not None:
        student.check(sampling, shift)
    items = {split: sorted({item["case"] for item in listed}) for split, listed in known["items"].items()}
    facts = {
        "format": FORMAT,
        "fibldm": fibldm.__version__,
        "name": settings.name or name,
        "version": settings.version,
        **definitions,
        **{key: _part(stage, key) for key in ("process", "target")},
        "conditions": present({**_part(stage, "conditions"), **token_defined, "mask": _part(stage, "mask")}),
        "shift": shift,
        "sampling": sampling.to_dict(),
        "space": {**known["space"], "autoencoder": fingerprints["autoencoder"]},
        **{key: known[key] for key in ("grid", "intensity", "envelope", "labels", "modality", "data")},
        "channels": known.get("channels", ["image"]),
        **of_network,
        "mask_dropout": float(stage.component("mask_dropout")),
        **({"adapters": _told(settings.adapters)} if settings.adapters else {}),
        **({"distilled": student.to_dict()} if student is not None else {}),
        **({"gate": gate.to_dict()} if (gate := read_gate(run, known)) else {}),
        "licence": settings.licence,
        "data_licence": _data_licence(known["licence"], settings.adapters),
        "split": hash_value(items),
        "weights": weights,
        "manifest": MANIFEST,
    }
    write_json(folder / GENERATOR, facts)
    return facts


def _told(adapters: Mapping[str | Path, float]) -> list[dict[str, Any]]:
    """What is part of the weights: of each adapter its file's SHA-256, strength, and what it was learned on."""
    read = {Adapter.read(file): strength for file, strength in adapters.items()}
    return [
        {
            "sha256": adapter.sha256,
            "strength": float(strength),
            **{key: adapter.facts[key] for key in ("stage", "rank", "alpha", "targets", "data")},
            **({"tokens": list(adapter.tokens)} if adapter.tokens else {}),
        }
        for adapter, strength in read.items()
    ]


def _data_licence(own: str | None, adapters: Mapping[str | Path, float]) -> str | None:
    """Of all data that the weights were learned on."""
    said = [own, *(Adapter.read(file).facts["data"].get("licence") for file in adapters)]
    return "; ".join(dict.fromkeys(licence for licence in said if licence)) or None


def _definition(stage: StageFolder) -> Any:
    """The network of a stage; what a ControlNet stands on was trained by the stage before."""
    base = str(stage.parser()["teacher"]) if taught(stage.name) else kind_of(stage.name).base
    known = {} if base is None else {"base": _definition(StageFolder(stage.run_dir, base))}
    return literal(stage.parser(device="cpu"), "network_def", known=known)


def _knowing(definition: Mapping[str, Any], token: TokenNames, width: int) -> dict[str, Any]:
    """A definition of a network with the tokens of adapters; they belong to its base network."""
    encoding = plain(token, TOKEN)
    if "base" in definition:
        conditions = {**(definition.get("conditions") or {}), TOKEN: encoding}
        return {**definition, "base": _knowing(definition["base"], token, width), "conditions": conditions}
    kind = f"{TokenVectors.__module__}.{TokenVectors.__qualname__}"
    vectors = {"_target_": kind, "encoding": encoding, "width": width}
    return {**definition, "time": {**(definition.get("time") or {}), TOKEN: vectors}}


def _part(stage: StageFolder, key: str) -> Any:
    return literal(stage.parser(device="cpu"), key)


def _kept(network: nn.Module, *, half: bool) -> dict[str, Tensor]:
    """The state as it is kept.

    Raises:
        FibldmError: a weight is too large for half precision.
    """
    state = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    if not half:
        return state
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if large := [name for name, tensor in halved.items() if not bool(tensor.isfinite().all())]:
        raise FibldmError(f"{large[0]} is too large for half precision", "leave `half` out")
    return halved


def _fits(definition: Any, state: Mapping[str, Tensor], key: str) -> None:
    """Make sure that the definition makes the network that these weights belong to."""
    wanted = build(definition, key).state_dict()
    if {name: tensor.shape for name, tensor in wanted.items()} != {name: part.shape for name, part in state.items()}:
        raise FibldmError(f"the definition of {key} must make the network that was trained; it makes another one")


def _write_model(file: Path, state: Mapping[str, Tensor]) -> None:
    """What ``monai.bundle.load`` reads; written by way of memory, as a file's name would go into it."""
    stream = io.BytesIO()
    torch.save(dict(state), stream)
    file.write_bytes(stream.getvalue())


def _residual_noise(run: Path, folder: Path, known: Mapping[str, Any]) -> dict[str, str] | None:
    file = residual_noise_file(run, known)
    if file is None:
        return None
    shutil.copyfile(file, folder / "models" / file.name)
    return {"file": f"models/{file.name}", "sha256": known["residual_noise"]["sha256"]}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder / "models"))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file())
