"""The parts of a synthesizer, from a run or from a bundle."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from monai.bundle import ConfigParser

from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage
from fibldm.models.conditions.condition import Condition, present
from fibldm.models.latents import LatentSpace
from fibldm.models.network import ConditionedNetwork, combine_controlnets
from fibldm.models.residual_noise import ResidualNoise
from fibldm.runs import StageFolder, hash_weights, load_facts
from fibldm.runs.stages import TABLE, StageKind, begun
from fibldm.runs.values import require_switches
from fibldm.synthesis.bundle import GENERATOR, open_bundle
from fibldm.synthesis.student import Student
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.gate import gate_of_bundle, read_gate
from fibldm.volumes.grid import ModelGrid
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.label_images import check_what_is_drawn


def parts_of_run(
    run_dir: str | Path,
    *,
    unconditional: bool,
    checkpoint: str,
    strength: float,
    others: Mapping[str | Path, float],
    device: str | torch.device,
    masks: bool = False,
) -> dict[str, Any]:
    """The fields of a `Synthesizer` from a run; see `Synthesizer.from_run`.

    Raises:
        FibldmError: as there.
    """
    _check_device(device)
    if not Path(run_dir).is_dir():
        raise FibldmError(f"the run must be a folder; {run_dir} is none", "check the path")
    facts = load_facts(run_dir)
    check_what_is_drawn(facts, run_dir, masks=masks)
    stage = generating_stage(Path(run_dir), unconditional=unconditional)
    noise = residual_noise_file(Path(run_dir), facts)
    network = stage.trained(checkpoint, device="cpu")
    student = Student.of_stage(stage)
    if student is not None and (strength != 1 or others):
        raise FibldmError(
            "a distilled network has its ControlNet in its weights, at strength 1; got a strength or others beside it",
            "leave them out, or draw with its teacher",
        )
    weights = hash_weights(network.state_dict())
    conditions = {**present(stage.component("conditions")), "mask": stage.component("mask")}
    if strength != 1 or others:
        network, weights = _joined(stage, network, weights, strength, others)
        conditions = _joined_conditions(stage, conditions, others)
    first_stage = FrozenFirstStage(StageFolder(Path(run_dir), "autoencoder").trained()).to(device)
    return {
        "network": network.to(device),
        "first_stage": first_stage,
        "process": stage.component("process"),
        "target": stage.component("target"),
        "conditions": _with_first_stage(conditions, first_stage),
        "source": {"weights": weights, "autoencoder": facts["space"]["autoencoder"], "licence": facts["licence"]},
        "shift": float(getattr(stage.component("times"), "shift", 1.0)),
        "residual_noise": ResidualNoise.load(noise) if noise is not None else None,
        "mask_dropout": float(stage.component("mask_dropout")),
        "choice": _choice(checkpoint, strength, others),
        "gate": read_gate(Path(run_dir), facts),
        "data": None if others else facts["data"],
        **_of_facts(facts),
        **({} if student is None else {"student": student, "sampling": student.own}),
    }


def parts_of_bundle(path: str | Path, *, trust: bool, device: str | torch.device) -> dict[str, Any]:
    """The fields of a `Synthesizer` from a bundle; see `Synthesizer.from_bundle`.

    Raises:
        FibldmError: as there.
    """
    require_switches(trust=trust)
    _check_device(device)
    with open_bundle(path, trust=trust) as bundle:
        check_what_is_drawn(bundle.facts, path, masks=False)
        network, autoencoder = bundle.network("network"), bundle.network("autoencoder")
        weights, fingerprint = (hash_weights(part.state_dict()) for part in (network, autoencoder))
        first_stage = FrozenFirstStage(cast(Autoencoder, autoencoder)).to(device)
        facts, source = bundle.facts, dict[str, Any](weights=weights, autoencoder=fingerprint)
        source |= {"changed": list(bundle.changed)} if bundle.changed else {}
        try:
            parts = {
                "network": cast(ConditionedNetwork, network).to(device),
                "first_stage": first_stage,
                "process": bundle.made("process"),
                "target": facts["target"],
                "conditions": _with_first_stage(bundle.conditions(), first_stage),
                "source": {**source, "licence": facts["licence"], "bundle": f"{facts['name']} {facts['version']}"},
                "shift": float(facts["shift"]),
                "residual_noise": bundle.residual_noise(),
                "mask_dropout": facts.get("mask_dropout"),
                "sampling": bundle.sampling(),
                "student": Student.from_dict(facts.get("distilled")),
                "gate": gate_of_bundle(facts),
                "data": None if facts.get("adapters") else facts["data"],
                **_of_facts(facts),
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FibldmError(
                f"{bundle.root / GENERATOR} must describe a generator; {type(error).__name__}: {error}",
                "ask for the bundle again, or export it again",
            ) from error
        parts["space"].check_autoencoder(fingerprint, str(bundle.root))
        return parts


def _with_first_stage(conditions: Mapping[str, Condition], first_stage: FrozenFirstStage) -> dict[str, Condition]:
    return {name: kind.with_first_stage(first_stage) for name, kind in conditions.items()}


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise FibldmError(
            f"the device must be one that this machine has; {device}: {str(error).splitlines()[0]}",
            "`fibldm doctor` says what is there; cpu always is",
        ) from error


def _choice(checkpoint: str, strength: float, others: Mapping[str | Path, float]) -> dict[str, Any]:
    """What differs from the generator as it was trained; folders by their names, which are no paths of a machine."""
    given = {"checkpoint": checkpoint, "strength": strength, "with": {Path(run).name: s for run, s in others.items()}}
    usual = {"checkpoint": "best", "strength": 1.0, "with": {}}
    return {name: value for name, value in given.items() if value != usual[name]}


def _of_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What runs and bundles say in the same words."""
    return {
        "space": LatentSpace.from_dict(facts["space"]),
        "grid": ModelGrid(tuple(facts["grid"]["spacing"]), tuple(facts["grid"]["size"])),
        "intensity": Intensity.from_dict(facts["intensity"]),
        "envelope": Envelope.from_dict(facts["envelope"]),
        "names": {int(value): name for value, name in facts["labels"].items() if int(value)},
        "channels": tuple(facts.get("channels", ("image",))),
    }


def residual_noise_file(run_dir: Path, facts: Mapping[str, Any]) -> Path | None:
    """What the encode stage measured; None where the decoder leaves nothing out, or it was not measured.

    Raises:
        FibldmError: the file is missing, or another one.
    """
    if facts.get("residual_noise") is None:
        return None
    file = run_dir / "latents" / str(facts["residual_noise"]["file"])
    if not file.exists() or hash_file(file) != facts["residual_noise"]["sha256"]:
        raise FibldmError(f"{file} must be as the encode stage wrote it; it is not", "run `fibldm encode --restart`")
    return file


def generating_stage(run_dir: Path, *, unconditional: bool = False) -> StageFolder:
    """The stage that volumes are drawn with: the last one that was begun of those that generate.

    Args:
        run_dir: the run folder.
        unconditional: where diffusion knows no mask, none that brings it one.

    Raises:
        FibldmError: nothing was trained that knows the mask, and that is wanted.
    """
    first, *later = (kind for kind in TABLE.values() if kind.generates)
    base, steered = StageFolder(run_dir, first.name), next(kind for kind in later if kind.brings_mask)
    if base.done() is None:
        return base if unconditional else StageFolder(run_dir, steered.name)
    fitting = [kind for kind in begun(run_dir) if kind in later]
    if base.component("mask_way") is None:
        others = fitting
        fitting = [kind for kind in fitting if brings_mask(run_dir, kind) != unconditional]
        if not fitting and not unconditional and any(kind.name == steered.name for kind in others):
            raise FibldmError(
                f"neither stage 2 of {run_dir} nor its ControlNet knows masks (control_mask is false)",
                "ask for volumes without masks: `fibldm synthesize` without --masks, `fibldm export --unconditional`, "
                "Synthesizer.from_run(..., unconditional=True)",
            )
        if not fitting and not unconditional:
            raise FibldmError(
                f"stage {steered.name!r} of {run_dir} must be finished first; it was never started, and stage 2 knows "
                "no masks",
                f"run `{steered.command}`; for volumes that follow no mask, `fibldm synthesize` without --masks, and "
                "`fibldm export --unconditional`",
            )
    return StageFolder(run_dir, (fitting or [first])[-1].name)


def brings_mask(run_dir: Path, kind: StageKind) -> bool:
    """Whether a stage that was begun follows masks even where stage 2 does not: a ControlNet that sees them.

    A student does so if its teacher does.
    """
    if kind.stands_on:
        return brings_mask(run_dir, TABLE[str(StageFolder(run_dir, kind.name).parser()["teacher"])])
    return kind.brings_mask and sees_mask(StageFolder(run_dir, kind.name).parser())


def sees_mask(parser: ConfigParser) -> bool:
    """Whether the ControlNet of a configuration sees the mask, as all do that do not say otherwise."""
    return bool(parser.get("control_mask", True))


def knows_masks(run_dir: Path) -> bool:
    """Whether a run has a finished stage that draws volumes from masks."""
    if any(brings_mask(run_dir, kind) and StageFolder(run_dir, kind.name).done() for kind in begun(run_dir)):
        return True
    base = StageFolder(run_dir, "diffusion")
    return base.done() is not None and base.component("mask_way") is not None


def generating_weights(run_dir: Path) -> set[str]:
    """Fingerprints of the stages that volumes are drawn with: from masks, and without where stage 2 knows none."""
    stages = [StageFolder(run_dir, kind.name) for kind in begun(run_dir) if kind.brings_mask or kind.stands_on]
    if StageFolder(run_dir, "diffusion").done():
        stages.append(generating_stage(run_dir, unconditional=True))
    return {str(done["weights"]) for stage in stages if (done := stage.done())}


def _joined(
    stage: StageFolder,
    network: ConditionedNetwork,
    weights: str,
    strength: float,
    others: Mapping[str | Path, float],
) -> tuple[ConditionedNetwork, str]:
    """A network with the ControlNets of other runs, and the fingerprint of all with their strengths."""
    stages = [stage, *(StageFolder(Path(run), "controlnet") for run in others)]
    strengths = [strength, *others.values()]
    if not all(0 <= value < math.inf for value in strengths):
        raise FibldmError(f"strengths must be numbers of at least 0; got {strengths}", "1 is as trained")
    for other in stages[1:]:
        if other.component("mask") != stage.component("mask"):
            raise FibldmError(
                f"the masks of {other.run_dir} must be encoded as those of {stage.run_dir}; they are not",
                "train its ControlNet with the same mask_detail, mask_resize and mask_feature",
            )
    all_weights = [weights, *(other.require()["weights"] for other in stages[1:])]
    networks = [network, *(other.trained(device="cpu") for other in stages[1:])]
    return combine_controlnets(networks, strengths), hash_value(
        [list(pair) for pair in zip(all_weights, strengths, strict=True)]
    )


def _joined_conditions(
    stage: StageFolder, conditions: Mapping[str, Condition], others: Mapping[str | Path, float]
) -> dict[str, Condition]:
    """What may be asked of ControlNets together: of each what it sees.

    Raises:
        FibldmError: two encode one condition in different ways.
    """
    joined = dict(conditions)
    for run in others:
        for name, kind in present(StageFolder(Path(run), "controlnet").component("conditions")).items():
            if joined.setdefault(name, kind) != kind:
                raise FibldmError(
                    f"the {name} of {run} must be encoded as that of {stage.run_dir}; it is not",
                    "train both ControlNets with the same conditions, on latents of the same data",
                )
    return joined
