"""From masks to synthetic volumes on the masks' own grids."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from nibabel.affines import from_matvec
from numpy.typing import NDArray
from torch import Tensor

import fibldm
from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage
from fibldm.models.conditioning import MaskEncoding
from fibldm.models.covariates import CovariateEncoding, Value
from fibldm.models.denoiser import Denoiser, thresholded
from fibldm.models.latents import LatentSpace
from fibldm.models.network import ConditionedNetwork, joined
from fibldm.models.process import Process, Target
from fibldm.models.residual_noise import ResidualNoise
from fibldm.models.samplers import draw_noise
from fibldm.models.tiling import tiled_decode
from fibldm.runs import StageFolder, hash_weights, load_facts
from fibldm.synthesis.bundle import GENERATOR, open_bundle
from fibldm.synthesis.settings import SamplingSettings
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.grid import Grid, ModelGrid, Volume, resample, turned_like
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.interchange import as_volume, to_sitk, to_torchio
from fibldm.volumes.masks import as_labels

if TYPE_CHECKING:
    import SimpleITK
    import torchio

UNCONDITIONAL = "unconditional"
"""The name of volumes that no mask was given for."""

NOTICE = "synthetic; a mask drawn on a real scan still carries the anatomy of its patient"
UNCONDITIONAL_NOTICE = "synthetic; drawn without a mask: it follows none, and its place in space says nothing"


@dataclass(frozen=True)
class Wanted:
    """One volume to make.

    Attributes:
        mask: integer labels ``(X, Y, Z)`` in any axis order; None asks for nothing: any volume, on the model grid.
        name: of the mask; with the seed and ``number`` it decides the noise.
        number: which of the volumes of this mask.
        covariates: what is asked of the patient beside the mask, by name; all else is unknown.
    """

    mask: Volume | None
    name: str = "mask"
    number: int = 0
    covariates: Mapping[str, object] = field(default_factory=dict)

    def generator(self, seed: int) -> torch.Generator:
        """Of all that is random about it; on the CPU, so that it is the same on any device."""
        key = hash_value((seed, self.name, self.number))
        return torch.Generator().manual_seed(int(key[:15], 16))


class _Placed(NamedTuple):
    """A wanted volume with its mask in RAS+ order, the model grid for it, and what of it was never trained on."""

    wanted: Wanted
    source: Volume
    grid: Grid
    covariates: dict[str, Value]
    outside: list[str]


@dataclass(frozen=True)
class Synthesis:
    """A synthetic volume in its units on disk, one `Volume` for each channel, and where it comes from."""

    channels: tuple[Volume, ...]
    provenance: dict[str, Any]

    @property
    def volume(self) -> Volume:
        """The volume of a run with one channel.

        Raises:
            FibldmError: the run has several.
        """
        if len(self.channels) > 1:
            raise FibldmError(f"this volume has {len(self.channels)} channels, not one", "take Synthesis.channels")
        return self.channels[0]

    def to_sitk(self) -> "SimpleITK.Image":
        """As an image of SimpleITK, of several channels with vector pixels; it has no mark that it is synthetic.

        Raises:
            FibldmError: the mask's axes were not at right angles.
        """
        return to_sitk(self.channels)

    def to_torchio(self) -> "torchio.ScalarImage":
        """As an image of TorchIO; it has no mark that it is synthetic."""
        return to_torchio(self.channels)


@dataclass(frozen=True)
class Synthesizer:
    """Everything that turns a mask into a volume; usually made by `from_run`.

    Attributes:
        network: with its ControlNet, in evaluation mode; says which covariates it knows.
        first_stage: the autoencoder.
        space: scale of its latents.
        process: the diffusion process of the network.
        target: what the network's output means.
        mask: how masks are encoded.
        grid: the model grid.
        intensity: between tensors and the units on disk.
        envelope: what the training data covered.
        source: what the sidecar says of the weights.
        names: of the labels by value, without background; needed for DICOM only.
        channels: names of the image channels, in order.
        shift: of the times in training, see `fibldm.models.timesteps.shifted`.
        residual_noise: what the decoder leaves out; None where nothing is, or it was not measured.
        mask_dropout: how often training showed the whole mask as unknown; None where that is not known.
        sampling: how volumes are drawn where nothing else is asked for: of a bundle, as it was measured.
        choice: for the sidecar, what of a run is not as it was trained: checkpoint, strength, further ControlNets.
    """

    network: ConditionedNetwork
    first_stage: FrozenFirstStage
    space: LatentSpace
    process: Process
    target: Target
    mask: MaskEncoding
    grid: ModelGrid
    intensity: Intensity
    envelope: Envelope
    source: dict[str, Any]
    names: Mapping[int, str] = field(default_factory=dict)
    channels: tuple[str, ...] = ("image",)
    shift: float = 1.0
    residual_noise: ResidualNoise | None = None
    mask_dropout: float | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    choice: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_run(
        cls,
        run_dir: str | Path,
        *,
        unconditional: bool = False,
        checkpoint: str = "best",
        strength: float = 1.0,
        others: Mapping[str | Path, float] | None = None,
        device: str | torch.device = "cpu",
    ) -> "Synthesizer":
        """The generator of a run: of its ControlNet stage, or of its diffusion stage where that knows the mask itself.

        Args:
            run_dir: the run folder.
            unconditional: take stage 2 where that knows no mask, for volumes that follow none.
            checkpoint: "best", or one that ``keep_every`` kept in training, such as "epoch_0010".
            strength: of its ControlNet; 1 is as trained, 0 switches it off.
            others: runs whose ControlNets are added, with their strengths; they stand on the same base network.
            device: where it works.

        Raises:
            FibldmError: a stage is not finished, its files do not fit each other, the runs do not, or there is no such
                checkpoint or device.
        """
        _check_device(device)
        if not Path(run_dir).is_dir():
            raise FibldmError(f"the run must be a folder; {run_dir} is none", "check the path")
        facts = load_facts(run_dir)
        stage, noise = (
            generating_stage(Path(run_dir), unconditional=unconditional),
            residual_noise_file(Path(run_dir), facts),
        )
        network = stage.trained(checkpoint, device="cpu")
        weights = hash_weights(network.state_dict())
        if strength != 1 or others:
            network, weights = _joined(stage, network, weights, strength, others or {})
        return cls(
            network=network.to(device),
            first_stage=FrozenFirstStage(StageFolder(Path(run_dir), "autoencoder").trained()).to(device),
            process=stage.component("process"),
            target=stage.component("target"),
            mask=stage.component("mask"),
            source={"weights": weights, "autoencoder": facts["space"]["autoencoder"], "licence": facts["licence"]},
            shift=float(getattr(stage.component("times"), "shift", 1.0)),
            residual_noise=ResidualNoise.load(noise) if noise is not None else None,
            mask_dropout=float(stage.component("mask_dropout")),
            choice=_choice(checkpoint, strength, others or {}),
            **_of_facts(facts),
        )

    @classmethod
    def from_bundle(cls, path: str | Path, *, trust: bool = False, device: str | torch.device = "cpu") -> "Synthesizer":
        """The generator of a bundle that ``fibldm export`` wrote; nothing that the bundle holds is run.

        Args:
            path: its folder, or a zip archive of that.
            trust: take what changed since its export, and make networks of any class that it names, of which there may
                be others than FibLDM knows.
            device: where it works.

        Raises:
            FibldmError: it is no such bundle, a part of it is refused, or there is no such device.
        """
        _check_device(device)
        with open_bundle(path, trust=trust) as bundle:
            network, autoencoder = bundle.network("network"), bundle.network("autoencoder")
            weights, fingerprint = (hash_weights(part.state_dict()) for part in (network, autoencoder))
            facts, source = bundle.facts, dict[str, Any](weights=weights, autoencoder=fingerprint)
            source |= {"changed": list(bundle.changed)} if bundle.changed else {}
            try:
                made = cls(
                    network=cast(ConditionedNetwork, network).to(device),
                    first_stage=FrozenFirstStage(cast(Autoencoder, autoencoder)).to(device),
                    process=bundle.made("process"),
                    target=facts["target"],
                    mask=bundle.made("mask"),
                    source={**source, "licence": facts["licence"], "bundle": f"{facts['name']} {facts['version']}"},
                    shift=float(facts["shift"]),
                    residual_noise=bundle.residual_noise(),
                    mask_dropout=facts.get("mask_dropout"),
                    sampling=bundle.sampling(),
                    **_of_facts(facts),
                )
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise FibldmError(
                    f"{bundle.root / GENERATOR} must describe a generator; {type(error).__name__}: {error}",
                    "ask for the bundle again, or export it again",
                ) from error
            made.space.check_autoencoder(fingerprint, str(bundle.root))
            return made

    @property
    def covariates(self) -> CovariateEncoding:
        """Those that the network was trained with, perhaps none."""
        return self.network.covariates or CovariateEncoding({})

    def __call__(
        self,
        mask: "Volume | SimpleITK.Image | torchio.LabelMap | torchio.Subject | None" = None,
        *,
        name: str | None = None,
        number: int = 0,
        covariates: Mapping[str, object] | None = None,
        settings: SamplingSettings | None = None,
        allow_extrapolation: bool = False,
        **sampling: Any,
    ) -> Synthesis:
        """One synthetic volume on the grid of ``mask``; see `Wanted` and `batch` for arguments and errors.

        Fields of `SamplingSettings` may be given by their names: ``synthesizer(mask, seed=1, steps=5, guidance=1.5)``.
        What is not given is as in ``settings``, or else as in `sampling`.
        """
        name = name or (UNCONDITIONAL if mask is None else "mask")
        wanted = [Wanted(None if mask is None else as_volume(mask), name, number, covariates or {})]
        chosen = (settings or self.sampling).changed(**sampling)
        return self.batch(wanted, settings=chosen, allow_extrapolation=allow_extrapolation)[0]

    def check(self, wanted: Wanted, *, allow_extrapolation: bool = False) -> list[str]:
        """What `batch` would refuse, before anything is made: mask and covariates.

        Returns:
            What of them lies outside what the training data covered, in words.

        Raises:
            FibldmError: as `batch`.
        """
        return self._place(wanted, allow_extrapolation).outside

    @torch.no_grad()
    def batch(
        self, wanted: Sequence[Wanted], *, settings: SamplingSettings | None = None, allow_extrapolation: bool = False
    ) -> list[Synthesis]:
        """Synthetic volumes, each on the grid of its mask, sampled together where they have one size.

        A volume is the same in any batch but for rounding: its noise depends on the seed, its mask's name and its
        number alone.

        Args:
            wanted: the volumes.
            settings: how to sample; None for the generator's own, `sampling`.
            allow_extrapolation: go on, and say so, where mask or covariates lie outside what the training data covered.

        Raises:
            FibldmError: a mask holds fractions or a label that the training data lack, or lies outside of them; so do
                covariates; or a dynamic threshold is asked of latents.
        """
        settings = self._as_trained(settings or self.sampling)
        placed = [self._place(one, allow_extrapolation) for one in wanted]
        made: dict[int, Synthesis] = {}
        for size in dict.fromkeys(part.grid.shape for part in placed):
            places = [place for place, part in enumerate(placed) if part.grid.shape == size]
            decoded = self._sample([placed[place] for place in places], settings)
            for place, volume in zip(places, decoded, strict=True):
                made[place] = self._finish(placed[place], volume, settings)
        return [made[place] for place in range(len(placed))]

    def _place(self, wanted: Wanted, allow_extrapolation: bool) -> _Placed:
        try:
            return self._placed(wanted, allow_extrapolation)
        except FibldmError as error:
            raise FibldmError(f"{wanted.name}: {error.message}", error.remedy) from error

    def _placed(self, wanted: Wanted, allow_extrapolation: bool) -> _Placed:
        if wanted.mask is not None and not self.network.sees_mask:
            raise FibldmError(
                "this generator was trained without masks, so that its volumes would not follow one; a mask was given",
                "ask for volumes without masks, or train with --config mask_concat or a ControlNet",
            )
        source = as_labels(wanted.mask or self._unknown()).canonical()
        self.mask.check(torch.from_numpy(source.array.astype(np.int64)))
        covariates = self.covariates.read(wanted.covariates)
        outside = [] if wanted.mask is None else self.envelope.check(source, allow=allow_extrapolation)
        outside += self._check_unknown(source, allow=allow_extrapolation)
        outside += self.covariates.check(covariates, allow=allow_extrapolation)
        grid = self.grid.synthesis_grid(source.grid, [step * self.network.multiple for step in self.mask.factors])
        return _Placed(wanted, source, grid, covariates, outside)

    def _check_unknown(self, labels: Volume, *, allow: bool) -> list[str]:
        """A mask that asks for nothing, of a network that never saw one."""
        if not self.network.sees_mask or self.mask_dropout != 0 or not (labels.array == UNKNOWN_LABEL).all():
            return []
        finding = "nothing is asked of the mask (training always showed one, as mask_dropout was 0)"
        if not allow:
            raise FibldmError(
                f"a mask must lie within what the training data covered; {finding}",
                "train with mask_dropout above 0, or give --allow-extrapolation (the sidecar will say so)",
            )
        return [finding]

    def _unknown(self) -> Volume:
        """A mask of the model grid that asks for nothing."""
        shift = -(np.array(self.grid.size) - 1) / 2 * self.grid.spacing  # centred, as no patient's place is known
        affine = from_matvec(np.diag(self.grid.spacing), shift)
        return Volume(np.full(self.grid.size, UNKNOWN_LABEL, dtype=np.uint8), affine)

    def _finish(self, placed: _Placed, decoded: NDArray[np.float32], settings: SamplingSettings) -> Synthesis:
        """Back from the model grid ``(C, X, Y, Z)`` to the mask's own, and to the units on disk."""
        source, grid = placed.source, placed.grid
        returned = [resample(Volume(part, grid.affine), source.grid, kind="image").array for part in decoded]
        on_disk = self.intensity.to_disk(np.stack(returned))
        wanted_grid = source.grid if placed.wanted.mask is None else placed.wanted.mask.grid
        channels = tuple(turned_like(replace(source, array=part), wanted_grid) for part in on_disk)
        same_spacing = bool(np.allclose(grid.spacing, source.grid.spacing))
        provenance = {
            "fibldm": fibldm.__version__,
            "torch": torch.__version__,
            "source": self.source,
            **({"choice": dict(self.choice)} if self.choice else {}),
            "number": placed.wanted.number,
            "sampling": settings.to_dict(),
            "covariates": {name: placed.covariates.get(name) for name in self.covariates.kinds},
            "follows_mask": placed.wanted.mask is not None,
            "network_calls": settings.calls_on(self.process),
            "channels": list(self.channels),
            "intensity": self.intensity.to_dict(),
            "units": self.intensity.units,
            "grid": {"size": list(grid.shape), "spacing_mm": list(grid.spacing), "resampled": not same_spacing},
            "extrapolation": placed.outside,
            "notice": NOTICE if placed.wanted.mask is not None else UNCONDITIONAL_NOTICE,
        }
        return Synthesis(channels, provenance)

    def _as_trained(self, settings: SamplingSettings) -> SamplingSettings:
        """Settings with the shift of the training times where they give none, and no noise that is not known."""
        known = {"latents": not self.first_stage.is_identity, "residual_noise": self.residual_noise is not None}
        return settings.as_trained(shift=self.shift, **known)

    def _sample(self, placed: Sequence[_Placed], settings: SamplingSettings) -> list[NDArray[np.float32]]:
        """Decoded volumes ``(C, X, Y, Z)`` of masks of one size, on the model grid, in ``[-1, 1]``."""
        device = next(self.network.parameters()).device
        labels = [resample(part.source, part.grid, kind="label", fill=UNKNOWN_LABEL).array for part in placed]
        drawn = torch.from_numpy(np.stack(labels).astype(np.int64)[:, None]).to(device)
        condition = self.mask.encode(drawn)
        generators = [part.wanted.generator(settings.seed) for part in placed]
        noise = draw_noise((len(self.space.mean), *condition.shape[2:]), generators).to(device)
        conditional = self._denoiser(condition, self._encoded(placed).to(device) if self.covariates.kinds else None)
        denoise = settings.guide(conditional, self._denoiser(self.mask.null(condition)))
        if settings.dynamic_threshold is not None:
            denoise = thresholded(denoise, self.space, settings.dynamic_threshold)
        times = settings.times(self.process)
        z = settings.draw(denoise, noise, times, process=self.process, generators=generators)
        decoded = [self._decode(z[place : place + 1], drawn[place : place + 1]) for place in range(len(placed))]
        if settings.residual_noise and self.residual_noise is not None:
            pairs = zip(decoded, generators, strict=True)
            decoded = [part + settings.residual_noise * self.residual_noise.draw(part, own) for part, own in pairs]
        return [part.clamp(-1, 1).cpu().numpy() for part in decoded]

    def _decode(self, z: Tensor, drawn: Tensor) -> Tensor:
        whole = MaskEncoding(self.mask.labels, compression=1).encode(drawn) if self.first_stage.needs_mask else None
        return tiled_decode(self.first_stage, self.space.denormalise(z), mask=whole)[0].float()

    def _encoded(self, placed: Sequence[_Placed]) -> Tensor:
        return torch.stack([self.covariates.encode(part.covariates) for part in placed])

    def _denoiser(self, condition: Tensor, covariates: Tensor | None = None) -> Denoiser:
        return Denoiser(self.network, self.process, self.target, condition, covariates)


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
    """The stage that volumes are drawn with: diffusion where that knows the mask and no ControlNet was begun.

    Args:
        run_dir: the run folder.
        unconditional: diffusion where that knows no mask, too.

    Raises:
        FibldmError: nothing was trained that knows the mask, and that is wanted.
    """
    base, controlnet = StageFolder(run_dir, "diffusion"), StageFolder(run_dir, "controlnet")
    if base.done() is None:
        return base if unconditional else controlnet
    knows_mask = base.component("mask_way") is not None
    if unconditional and not knows_mask:
        return base
    if controlnet.path.exists() or knows_mask:
        return controlnet if controlnet.path.exists() else base
    raise FibldmError(
        f"stage 'controlnet' of {run_dir} must be finished first; it was never started, and stage 2 knows no masks",
        "run `fibldm train controlnet`; for volumes that follow no mask, `fibldm synthesize` without --masks, and "
        "`fibldm export --unconditional`",
    )


def generating_weights(run_dir: Path) -> set[str]:
    """Fingerprints of the stages that volumes are drawn with: from masks, and without where stage 2 knows none."""
    stages = [StageFolder(run_dir, "controlnet")]
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
    return joined(networks, strengths), hash_value([list(pair) for pair in zip(all_weights, strengths, strict=True)])
