"""The main job: from a mask to a synthetic volume on the mask's own grid."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from fibldm.models.timesteps import sampling_times
from fibldm.runs import StageFolder, load_facts
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.grid import ModelGrid, Volume, read_volume, resample, turned_like
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import sidecar, volume_stem, write_labels, write_synthetic


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
        source = _as_labels(mask).canonical()
        self.mask.check(torch.from_numpy(source.array.astype(np.int64)))
        outside = self.envelope.check(source, allow=allow_extrapolation)
        grid = self.grid.synthesis_grid(source.grid, self.mask.compression * self.network.multiple)
        same_spacing = np.allclose(grid.spacing, source.grid.spacing)
        placed = resample(source, grid, kind="label", fill=UNKNOWN_LABEL)
        decoded = self._sample(placed, key=(settings.seed, name, number), settings=settings)
        returned = resample(Volume(decoded, grid.affine), source.grid, kind="image")
        volume = turned_like(Volume(self.intensity.to_disk(returned.array), source.affine), mask.grid)
        provenance = {
            "fibldm": fibldm.__version__,
            "torch": torch.__version__,
            "source": self.source,
            "number": number,
            "sampling": asdict(settings),
            "network_calls": settings.network_calls,
            "intensity": self.intensity.to_dict(),
            "units": self.intensity.units,
            "grid": {"size": list(grid.shape), "spacing_mm": list(grid.spacing), "resampled": not same_spacing},
            "extrapolation": outside,
            "notice": "synthetic; a mask drawn on a real scan still carries the anatomy of its patient",
        }
        return Synthesis(volume, provenance)

    def _sample(self, labels: Volume, *, key: tuple[int, str, int], settings: SamplingSettings) -> NDArray[np.float32]:
        device = next(self.network.parameters()).device
        condition = self.mask.encode(torch.from_numpy(labels.array.astype(np.int64))[None, None].to(device))
        generator = torch.Generator().manual_seed(int(hash_value(key)[:15], 16))
        shape = (len(self.space.mean), *condition.shape[2:])
        noise = draw_noise(shape, [generator]).to(device)
        denoise = guided(self._denoiser(condition), self._denoiser(self.mask.null(condition)), settings.guidance)
        times = sampling_times(settings.steps, spacing=self.process.sampling_spacing)
        z = sampler(settings.sampler)(denoise, noise, times, process=self.process, generators=[generator])
        volume: Tensor = self.first_stage.decode(self.space.denormalise(z))
        return volume[0, 0].clamp(-1, 1).float().cpu().numpy()

    def _denoiser(self, condition: Tensor) -> Denoiser:
        return Denoiser(self.network, self.process, self.target, condition)


@dataclass(frozen=True)
class Synthesis:
    """A synthetic volume in its units on disk, and where it comes from."""

    volume: Volume
    provenance: dict[str, Any]


def synthesize_file(
    synthesizer: Synthesizer,
    mask_file: Path,
    out: Path,
    *,
    number: int,
    settings: SamplingSettings,
    allow_extrapolation: bool = False,
) -> Path:
    """Write volume ``number`` of a mask file to ``OUT/<mask stem>_<number:03d>.nii.gz`` with its sidecar.

    A volume that lies there already and was made in the same way is kept; the mask as used is written to ``OUT/masks``.

    Raises:
        FibldmError: another volume or mask of this name lies there, or the mask is refused.
    """
    stem = volume_stem(mask_file)
    path = out / f"{stem}_{number:03d}.nii.gz"
    request = {
        "mask": mask_file.name,
        "mask_sha256": hash_file(mask_file),
        "request": hash_value([synthesizer.source, asdict(settings), number]),
    }
    if path.exists():
        _check_same(path, request)
        return path
    mask = read_volume(str(mask_file))
    made = synthesizer(mask, name=stem, number=number, settings=settings, allow_extrapolation=allow_extrapolation)
    _keep_mask(out / "masks" / f"{stem}.nii.gz", _as_labels(mask))
    write_synthetic(path, made.volume, {**request, **made.provenance})
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
) -> list[Path]:
    """Write ``count`` volumes of every mask that ``masks`` names (files and folders), with a progress bar.

    Args:
        run_dir: a run whose ControlNet stage is finished.
        masks: NIfTI files, and folders of them.
        out: folder to write to; see `synthesize_file`.
        count: volumes per mask.
        settings: how to sample.
        allow_extrapolation: go on where a mask lies outside what the training data covered.
        device: None takes CUDA where there is one.

    Raises:
        FibldmError: no mask, one that is refused, or a run that is not finished.
    """
    files = find_masks([Path(mask) for mask in masks])
    synthesizer = Synthesizer.from_run(run_dir, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    jobs = [(file, number) for file in files for number in range(count)]
    console = Console(stderr=True)
    return [
        synthesize_file(
            synthesizer, file, Path(out), number=number, settings=settings, allow_extrapolation=allow_extrapolation
        )
        for file, number in track(jobs, "synthesize", console=console, disable=not console.is_terminal)
    ]


def find_masks(sources: list[Path]) -> list[Path]:
    """The mask files that a list of files and folders names, in order of their names.

    Raises:
        FibldmError: there is none, one is not NIfTI, or two have the same name.
    """
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise FibldmError(f"masks must exist; {source} does not")
        files += volumes_in(source) if source.is_dir() else [source]
    wrong = [str(file) for file in files if not file.name.endswith((".nii", ".nii.gz"))]
    if wrong or not files:
        raise FibldmError(f"masks must be NIfTI files (.nii, .nii.gz); got {', '.join(wrong) or 'none'}")
    stems = [volume_stem(file) for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise FibldmError(f"every mask needs a name of its own; given twice: {', '.join(twice)}", "rename them")
    return files


def volumes_in(folder: Path) -> list[Path]:
    """NIfTI files, but none that begins with a dot: those are unfinished, or hold the attributes of another file."""
    return sorted(file for file in folder.glob("[!.]*") if file.name.endswith((".nii", ".nii.gz")))


def _as_labels(mask: Volume) -> Volume:
    rounded = np.rint(mask.array)
    if not np.isfinite(mask.array).all() or not np.array_equal(rounded, mask.array):
        raise FibldmError("a mask must hold whole numbers", "is this a label map, and not an image or a probability?")
    if rounded.min() < 0 or rounded.max() > UNKNOWN_LABEL:
        raise FibldmError(f"mask labels must lie in 0..255; got {int(rounded.min())}..{int(rounded.max())}")
    return Volume(rounded.astype(np.uint8), mask.affine)


def _keep_mask(path: Path, labels: Volume) -> None:
    if not path.exists():
        write_labels(path, labels)
        return
    there = read_volume(str(path))
    if not np.array_equal(there.array, labels.array) or not np.allclose(there.affine, labels.affine, atol=1e-4):
        raise FibldmError(f"{path} lies there already and is another mask", "choose another --out folder")


def _check_same(path: Path, request: dict[str, Any]) -> None:
    there = read_json(sidecar(path))
    if any(there.get(key) != value for key, value in request.items()):
        raise FibldmError(
            f"{path} lies there already and was made from another mask, run or settings", "choose another --out folder"
        )
