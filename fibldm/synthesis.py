"""The main job: from a mask to a synthetic volume on the mask's own grid."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

import fibldm
from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value, read_json
from fibldm.models.autoencoder import FrozenFirstStage
from fibldm.models.conditioning import MaskEncoding
from fibldm.models.denoiser import Denoiser, guided
from fibldm.models.latents import LatentSpace
from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import Process, Target
from fibldm.models.samplers import calls, draw_noise, sampler
from fibldm.models.tiling import tiled_decode
from fibldm.models.timesteps import sampling_times
from fibldm.runs import StageFolder, load_facts
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.grid import ModelGrid, Volume, resample, turned_like
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.masks import as_labels, find_masks, keep_mask, mask_stem, read_mask
from fibldm.volumes.masks import volumes_in as volumes_in
from fibldm.volumes.writer import sidecar, write_synthetic

if TYPE_CHECKING:
    from fibldm.volumes.dicom.output import DicomOutput


@dataclass(frozen=True)
class SamplingSettings:
    """How volumes are drawn.

    Attributes:
        sampler: one of `fibldm.models.samplers.SAMPLERS`.
        steps: of the sampler, from noise to data.
        guidance: 1 is none; above 5 medical volumes turn into caricatures.
        seed: with the mask's name and the number of the volume, decides its noise.
    """

    sampler: str = "dpmpp_2m"
    steps: int = 10
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        sampler(self.sampler)
        if self.steps < 1:
            raise FibldmError(f"steps must be at least 1; got {self.steps}")
        if not 0 <= self.guidance < math.inf:
            raise FibldmError(f"guidance must be a number of at least 0; got {self.guidance}")

    @property
    def network_calls(self) -> int:
        """UNet passes per volume, each with its ControlNet; guidance counts two."""
        return calls(self.sampler, self.steps) * (1 if self.guidance == 1 else 2)


@dataclass(frozen=True)
class Synthesizer:
    """Everything that turns a mask into a volume; usually made by `from_run`.

    Attributes:
        network: with its ControlNet, in evaluation mode.
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

    @classmethod
    def from_run(cls, run_dir: str | Path, *, device: str | torch.device = "cpu") -> "Synthesizer":
        """The generator of a run whose ControlNet stage is finished.

        Raises:
            FibldmError: a stage is not finished, or its files do not fit each other.
        """
        facts = load_facts(run_dir)
        stage = StageFolder(Path(run_dir), "controlnet")
        weights = stage.require()["weights"]
        return cls(
            network=stage.trained(device="cpu").to(device),
            first_stage=FrozenFirstStage(StageFolder(Path(run_dir), "autoencoder").trained()).to(device),
            space=LatentSpace.from_dict(facts["space"]),
            process=stage.component("process"),
            target=stage.component("target"),
            mask=stage.component("mask"),
            grid=ModelGrid(tuple(facts["grid"]["spacing"]), tuple(facts["grid"]["size"])),
            intensity=Intensity.from_dict(facts["intensity"]),
            envelope=Envelope.from_dict(facts["envelope"]),
            source={"weights": weights, "autoencoder": facts["space"]["autoencoder"], "licence": facts["licence"]},
            names={int(value): name for value, name in facts["labels"].items() if int(value)},
            channels=tuple(facts.get("channels", ("image",))),
        )

    @torch.no_grad()
    def __call__(
        self,
        mask: Volume,
        *,
        name: str = "mask",
        number: int = 0,
        settings: SamplingSettings | None = None,
        allow_extrapolation: bool = False,
    ) -> "Synthesis":
        """One synthetic volume on the grid of ``mask``.

        Args:
            mask: integer labels ``(X, Y, Z)`` in any axis order.
            name: of the mask; with the seed and ``number`` it decides the noise.
            number: which of the volumes of this mask.
            settings: how to sample; None for the defaults.
            allow_extrapolation: go on, and say so, where the mask lies outside what the training data covered.

        Raises:
            FibldmError: the mask holds fractions or a label that the training data lack, or lies outside of them.
        """
        settings = settings or SamplingSettings()
        source = as_labels(mask).canonical()
        self.mask.check(torch.from_numpy(source.array.astype(np.int64)))
        outside = self.envelope.check(source, allow=allow_extrapolation)
        grid = self.grid.synthesis_grid(source.grid, [step * self.network.multiple for step in self.mask.factors])
        same_spacing = np.allclose(grid.spacing, source.grid.spacing)
        placed = resample(source, grid, kind="label", fill=UNKNOWN_LABEL)
        decoded = self._sample(placed, key=(settings.seed, name, number), settings=settings)
        returned = [resample(Volume(part, grid.affine), source.grid, kind="image").array for part in decoded]
        on_disk = self.intensity.to_disk(np.stack(returned))
        channels = tuple(turned_like(Volume(part, source.affine), mask.grid) for part in on_disk)
        provenance = {
            "fibldm": fibldm.__version__,
            "torch": torch.__version__,
            "source": self.source,
            "number": number,
            "sampling": asdict(settings),
            "network_calls": settings.network_calls,
            "channels": list(self.channels),
            "intensity": self.intensity.to_dict(),
            "units": self.intensity.units,
            "grid": {"size": list(grid.shape), "spacing_mm": list(grid.spacing), "resampled": not same_spacing},
            "extrapolation": outside,
            "notice": "synthetic; a mask drawn on a real scan still carries the anatomy of its patient",
        }
        return Synthesis(channels, provenance)

    def _sample(self, labels: Volume, *, key: tuple[int, str, int], settings: SamplingSettings) -> NDArray[np.float32]:
        device = next(self.network.parameters()).device
        drawn = torch.from_numpy(labels.array.astype(np.int64))[None, None].to(device)
        condition = self.mask.encode(drawn)
        generator = torch.Generator().manual_seed(int(hash_value(key)[:15], 16))
        shape = (len(self.space.mean), *condition.shape[2:])
        noise = draw_noise(shape, [generator]).to(device)
        denoise = guided(self._denoiser(condition), self._denoiser(self.mask.null(condition)), settings.guidance)
        times = sampling_times(settings.steps, spacing=self.process.sampling_spacing)
        z = sampler(settings.sampler)(denoise, noise, times, process=self.process, generators=[generator])
        whole = MaskEncoding(self.mask.labels, compression=1).encode(drawn) if self.first_stage.needs_mask else None
        volume = tiled_decode(self.first_stage, self.space.denormalise(z), mask=whole)
        return volume[0].clamp(-1, 1).float().cpu().numpy()

    def _denoiser(self, condition: Tensor) -> Denoiser:
        return Denoiser(self.network, self.process, self.target, condition)


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


def synthesize_file(
    synthesizer: Synthesizer,
    mask_file: Path,
    out: Path,
    *,
    number: int,
    settings: SamplingSettings,
    allow_extrapolation: bool = False,
    dicom: "DicomOutput | None" = None,
) -> Path:
    """Write volume ``number`` of a mask file to ``OUT/<mask stem>_<number:03d>.nii.gz`` with its sidecar.

    A volume that lies there already and was made in the same way is kept; the mask as used is written to ``OUT/masks``.

    Args:
        synthesizer: makes the volume.
        mask_file: NIfTI, or a DICOM segmentation whose segments have the names of the run's labels.
        out: folder to write to.
        number: which of the volumes of this mask.
        settings: how to sample.
        allow_extrapolation: go on where the mask lies outside what the training data covered.
        dicom: writes a DICOM series ``OUT/<mask stem>_<number:03d>/`` and the mask as a segmentation; None is NIfTI.

    Raises:
        FibldmError: another volume or mask of this name lies there, the mask is refused, or cannot be told in DICOM.
    """
    stem = mask_stem(mask_file)
    nifti, series = out / f"{stem}_{number:03d}.nii.gz", out / f"{stem}_{number:03d}"
    path, other = (nifti, series) if dicom is None else (series, nifti)
    request = {
        "mask": mask_file.name,
        "mask_sha256": hash_file(mask_file),
        "request": hash_value([synthesizer.source, asdict(settings), number]),
    }
    if dicom is not None:
        request["dicom_request"] = dicom.fingerprint(synthesizer.names)
    if other.exists():
        raise FibldmError(f"{other} lies there already, in another format", "choose another --out folder")
    if path.exists():
        _check_same(path, request)
        if dicom is None:
            keep_mask(out / "masks" / f"{stem}.nii.gz", as_labels(read_mask(mask_file, synthesizer.names)))
        else:
            dicom.check_whole(path)
        return path
    mask = read_mask(mask_file, synthesizer.names)
    if dicom is not None:
        dicom.check(mask.grid, synthesizer.names, synthesizer.intensity)
    made = synthesizer(mask, name=stem, number=number, settings=settings, allow_extrapolation=allow_extrapolation)
    if dicom is None:
        keep_mask(out / "masks" / f"{stem}.nii.gz", as_labels(mask))
        write_synthetic(path, made.channels, {**request, **made.provenance})
    else:
        dicom.write(
            path,
            made.volume,
            as_labels(mask),
            names=synthesizer.names,
            intensity=synthesizer.intensity,
            request=request,
            provenance=made.provenance,
        )
    return path


def synthesize_files(
    run_dir: str | Path,
    masks: Sequence[str | Path],
    out: str | Path,
    *,
    count: int,
    settings: SamplingSettings,
    allow_extrapolation: bool = False,
    device: str | torch.device | None = None,
    dicom: "DicomOutput | None" = None,
) -> list[Path]:
    """Write ``count`` volumes of every mask that ``masks`` names (files and folders), with a progress bar.

    Args:
        run_dir: a run whose ControlNet stage is finished.
        masks: NIfTI files and DICOM segmentations, and folders of them.
        out: folder to write to; see `synthesize_file`.
        count: volumes per mask.
        settings: how to sample.
        allow_extrapolation: go on where a mask lies outside what the training data covered.
        device: None takes CUDA where there is one.
        dicom: writes DICOM instead of NIfTI.

    Raises:
        FibldmError: no mask, one that is refused, or a run that is not finished.
    """
    files = find_masks([Path(mask) for mask in masks])
    synthesizer = Synthesizer.from_run(run_dir, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    jobs = [(file, number) for file in files for number in range(count)]
    console = Console(stderr=True)
    return [
        synthesize_file(
            synthesizer,
            file,
            Path(out),
            number=number,
            settings=settings,
            allow_extrapolation=allow_extrapolation,
            dicom=dicom,
        )
        for file, number in track(jobs, "synthesize", console=console, disable=not console.is_terminal)
    ]


def _check_same(path: Path, request: dict[str, Any]) -> None:
    there = read_json(sidecar(path))
    if any(there.get(key) != value for key, value in request.items()):
        raise FibldmError(
            f"{path} lies there already and was made from another mask, run or settings", "choose another --out folder"
        )
