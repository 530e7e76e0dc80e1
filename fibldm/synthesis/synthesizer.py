"""From masks to synthetic volumes on the masks' own grids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from nibabel.affines import from_matvec
from numpy.typing import NDArray
from torch import Tensor

import fibldm
from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.adapters import frame_of
from fibldm.models.autoencoder import FrozenFirstStage
from fibldm.models.conditions.condition import Condition
from fibldm.models.conditions.covariates import CovariateEncoding
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.denoiser import Denoiser, thresholded
from fibldm.models.inpainting import KnownLatents
from fibldm.models.joint_tiles import JointTiles
from fibldm.models.latents import LatentSpace
from fibldm.models.mark import Mark
from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import Process, Target
from fibldm.models.residual_noise import ResidualNoise
from fibldm.models.samplers import Denoise, draw_noise
from fibldm.models.tiling import tiled_decode
from fibldm.synthesis.adapters import with_adapters
from fibldm.synthesis.asked import check as check_asked
from fibldm.synthesis.asked import read, together, within
from fibldm.synthesis.checking import DRAWS_AGAIN, Check, CopyCheck, OutsideRanges, RangeCheck, Rejected, checked
from fibldm.synthesis.loading import parts_of_bundle, parts_of_run
from fibldm.synthesis.request import UNCONDITIONAL, PreparedMask, Synthesis, SynthesisRequest
from fibldm.synthesis.settings import SamplingSettings
from fibldm.synthesis.student import Student
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.gate import Gate, required
from fibldm.volumes.grid import ModelGrid, Volume, resample, turned_like
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.interchange import as_volume
from fibldm.volumes.known_scans import KnownScans
from fibldm.volumes.masks import as_labels

if TYPE_CHECKING:
    import SimpleITK
    import torchio

NOTICE = "synthetic; a mask drawn on a real scan still carries the anatomy of its patient"
UNCONDITIONAL_NOTICE = "synthetic; drawn without a mask: it follows none, and its place in space says nothing"


@dataclass(frozen=True)
class Synthesizer:
    """Everything that turns a mask into a volume; usually made by `from_run`.

    Attributes:
        network: with its ControlNet, in evaluation mode.
        first_stage: the autoencoder.
        space: scale of its latents.
        process: the diffusion process of the network.
        target: what the network's output means.
        conditions: what may be asked of a volume, by name, and how it is encoded; masks always.
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
        choice: for the sidecar, what is not as it was trained: checkpoint, strength, further ControlNets, adapters.
        gate: in which ranges intensities of training cases lie; None where that was not measured.
        data: fingerprint of the dataset that all of its networks were trained on; None where some were on others.
        student: what it was distilled for and from; None is no distilled network.
        mark: what drawn noise is marked with; None, for comparisons, leaves voxels without a mark, and sidecars say so.
    """

    network: ConditionedNetwork
    first_stage: FrozenFirstStage
    space: LatentSpace
    process: Process
    target: Target
    conditions: Mapping[str, Condition]
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
    gate: Gate | None = None
    data: str | None = None
    student: Student | None = None
    mark: Mark | None = field(default_factory=Mark.from_environment)

    @classmethod
    def from_run(
        cls,
        run_dir: str | Path,
        *,
        unconditional: bool = False,
        checkpoint: str = "best",
        strength: float = 1.0,
        others: Mapping[str | Path, float] | None = None,
        adapters: Mapping[str | Path, float] | None = None,
        device: str | torch.device = "cpu",
        masks: bool = False,
    ) -> "Synthesizer":
        """The generator of a run: of its ControlNet stage, or of its diffusion stage where that knows the mask itself.

        Args:
            run_dir: the run folder.
            unconditional: take stage 2 where that knows no mask, for volumes that follow none.
            checkpoint: "best", or one that ``keep_every`` kept in training, such as "epoch_0010".
            strength: of its ControlNet; 1 is as trained, 0 switches it off.
            others: runs whose ControlNets are added, with their strengths; they stand on the same base network.
            adapters: see `adapted`.
            device: where it works.
            masks: whether it must draw masks, see `fibldm.synthesis.label_maps`, or volumes.

        Raises:
            FibldmError: it draws the other of masks and volumes, a stage is not finished, its files do not fit each
                other, the runs or adapters do not, or there is no such checkpoint or device.
        """
        choices: dict[str, Any] = {
            "checkpoint": checkpoint,
            "strength": strength,
            "others": others or {},
            "device": device,
            "masks": masks,
        }
        return cls(**parts_of_run(run_dir, unconditional=unconditional, **choices)).adapted(adapters or {})

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        *,
        trust: bool = False,
        adapters: Mapping[str | Path, float] | None = None,
        device: str | torch.device = "cpu",
    ) -> "Synthesizer":
        """The generator of a bundle that ``fibldm export`` wrote; nothing that the bundle holds is run.

        Args:
            path: its folder, or a zip archive of that.
            trust: take what changed since its export, and make networks of any class that it names, of which there may
                be others than FibLDM knows.
            adapters: see `adapted`.
            device: where it works.

        Raises:
            FibldmError: it is no such bundle, a part of it or an adapter is refused, or there is no such device.
        """
        return cls(**parts_of_bundle(path, trust=trust, device=device)).adapted(adapters or {})

    def adapted(self, adapters: Mapping[str | Path, float]) -> "Synthesizer":
        """The generator with adapters put on its network; it stays as it is itself.

        Args:
            adapters: files ``adapter.safetensors`` of training with ``--config adapter``, with their strengths: 0 draws
                what the generator alone draws, to the bit, 1 is as trained, and several add up.

        Raises:
            FibldmError: one is no adapter, was trained on other weights or in another frame, or its strength is no
                number of at least 0.
        """
        return replace(self, **with_adapters(self, adapters)) if adapters else self

    @property
    def frame(self) -> dict[str, Any]:
        """What an adapter must have been trained with, see `fibldm.models.adapters.frame_of`."""
        intensity, spacing = self.intensity.to_dict(), self.grid.spacing
        return frame_of(self.space, self.process, self.target, self.conditions, intensity=intensity, spacing=spacing)

    @property
    def mask(self) -> MaskEncoding:
        """How masks are encoded."""
        return cast(MaskEncoding, self.conditions["mask"])

    @property
    def covariates(self) -> CovariateEncoding:
        """Those that the network was trained with, perhaps none."""
        return cast(CovariateEncoding, self.conditions.get("covariates", CovariateEncoding({})))

    @property
    def beside(self) -> dict[str, Condition]:
        """The conditions beside the mask, by name: covariates, and further ones."""
        others = {name: kind for name, kind in self.conditions.items() if name != "mask"}
        return {"covariates": self.covariates, **others}

    def __call__(
        self,
        mask: "Volume | SimpleITK.Image | torchio.LabelMap | torchio.Subject | None" = None,
        *,
        name: str | None = None,
        number: int = 0,
        covariates: Mapping[str, object] | None = None,
        conditions: Mapping[str, object] | None = None,
        settings: SamplingSettings | None = None,
        allow_extrapolation: bool = False,
        check: int | None = None,
        reject_copies: KnownScans | None = None,
        **sampling: Any,
    ) -> Synthesis:
        """One synthetic volume on the grid of ``mask``; see `SynthesisRequest` and `batch` for arguments and errors.

        What is asked beside the mask are ``covariates`` and further ``conditions``, each by their names; ``check``
        and ``reject_copies`` are those of `draw`.
        Fields of `SamplingSettings` may be given by their names: ``synthesizer(mask, seed=1, steps=5, guidance=1.5)``.
        What is not given is as in ``settings``, or else as in `sampling`.
        """
        name = name or (UNCONDITIONAL if mask is None else "mask")
        image = None if mask is None else as_volume(mask)
        request = SynthesisRequest(image, name, number, together(covariates or {}, conditions or {}))
        chosen = (settings or self.sampling).changed(**sampling)
        asked: dict[str, Any] = {"check": check, "reject_copies": reject_copies}
        return self.batch([request], settings=chosen, allow_extrapolation=allow_extrapolation, **asked)[0]

    def batch(
        self,
        requests: Sequence[SynthesisRequest],
        *,
        settings: SamplingSettings | None = None,
        allow_extrapolation: bool = False,
        check: int | None = None,
        reject_copies: KnownScans | None = None,
    ) -> list[Synthesis]:
        """Synthetic volumes, each on the grid of its mask; what `draw` gives of what `prepare` gives.

        Args:
            requests: the volumes.
            settings: how to sample; None for the defaults.
            allow_extrapolation: see `prepare`.
            check: see `draw`.
            reject_copies: see `draw`.

        Raises:
            FibldmError: see `prepare` and `draw`.
        """
        prepared = [self.prepare(request, allow_extrapolation=allow_extrapolation) for request in requests]
        return self.draw(prepared, settings=settings, check=check, reject_copies=reject_copies)

    def prepare(self, request: SynthesisRequest, *, allow_extrapolation: bool = False) -> PreparedMask:
        """Check and place a mask, with what is asked beside it, once for any number of its volumes.

        Args:
            request: one of the volumes.
            allow_extrapolation: go on, and say so, where mask or conditions lie outside what the training data covered.

        Raises:
            FibldmError: the mask holds fractions or a label that the training data lack, or lies outside of them; so do
                other conditions; or the generator knows no masks.
        """
        try:
            return self._placed(request, allow_extrapolation)
        except FibldmError as error:
            raise FibldmError(f"{request.name}: {error.message}", error.remedy) from error

    def draw(
        self,
        prepared: Sequence[PreparedMask],
        *,
        settings: SamplingSettings | None = None,
        check: int | None = None,
        reject_copies: KnownScans | None = None,
    ) -> list[Synthesis]:
        """Synthetic volumes of prepared masks, sampled together where they have one size.

        A volume is the same in any batch but for rounding: its noise depends on the seed, its mask's name and its
        number alone.

        Args:
            prepared: by this synthesizer; see `PreparedMask.numbered` for several volumes of one mask.
            settings: how to sample; None for the generator's own, `sampling`.
            check: how often a volume whose intensities lie outside of the ranges of training is drawn again, with
                another seed (see `fibldm.synthesis.checking.seed_of_draw`); None looks at no ranges.
            reject_copies: training scans of an audit, of which no volume may be a copy: one that is, is drawn again, at
                most ``check`` times, or `fibldm.synthesis.checking.DRAWS_AGAIN` times without that.

        Raises:
            FibldmError: a dynamic threshold is asked of latents, a check where no ranges were measured, or an audit is
                of other data and of other weights.
            OutsideRanges: every draw of a volume was refused; none is given then.
        """
        attempts = self.attempt(prepared, settings=settings, check=check, reject_copies=reject_copies)
        if rejected := [attempt for attempt in attempts if isinstance(attempt, Rejected)]:
            raise OutsideRanges(rejected)
        return [attempt for attempt in attempts if isinstance(attempt, Synthesis)]

    def attempt(
        self,
        prepared: Sequence[PreparedMask],
        *,
        settings: SamplingSettings | None,
        check: int | None,
        reject_copies: KnownScans | None = None,
    ) -> list[Synthesis | Rejected]:
        """The same as `draw`, but for a volume of which every draw was refused, why.

        Raises:
            FibldmError: see `draw`.
        """
        settings = self.as_trained(settings or self.sampling)
        if checks := self.checks(check, reject_copies):
            return checked(self, prepared, settings, checks, DRAWS_AGAIN if check is None else check)
        decoded = self.decoded(prepared, settings)
        return [self.finished(part, volume, settings) for part, volume in zip(prepared, decoded, strict=True)]

    def checks(self, check: int | None, reject_copies: KnownScans | None) -> list[Check]:
        """Those that look at each volume, see `draw`.

        Raises:
            FibldmError: no ranges were measured, or the audit is of other data and of other weights.
        """
        checks: list[Check] = [] if check is None else [RangeCheck(self.require_gate())]
        if reject_copies is not None:
            reject_copies.require(data=self.data, weights=str(self.source["weights"]))
            checks.append(CopyCheck(reject_copies))
        return checks

    def require_gate(self) -> Gate:
        """The ranges of training.

        Raises:
            FibldmError: they were not measured.
        """
        return required(self.gate)

    @torch.no_grad()
    def decoded(self, prepared: Sequence[PreparedMask], settings: SamplingSettings) -> list[NDArray[np.float32]]:
        """Volumes ``(C, X, Y, Z)`` in ``[-1, 1]`` on the model grids of prepared masks.

        Args:
            prepared: by this synthesizer.
            settings: as `as_trained` gives them.
        """
        made: dict[int, NDArray[np.float32]] = {}
        for size in dict.fromkeys(part.grid.shape for part in prepared):
            places = [place for place, part in enumerate(prepared) if part.grid.shape == size]
            volumes = self._sample([prepared[place] for place in places], settings)
            made |= zip(places, volumes, strict=True)
        return [made[place] for place in range(len(prepared))]

    def _placed(self, request: SynthesisRequest, allow_extrapolation: bool) -> PreparedMask:
        if request.mask is not None and not self.network.sees_mask:
            raise FibldmError(
                "this generator was trained without masks, so that its volumes would not follow one; a mask was given",
                "ask for volumes without masks, or train with --config mask_concat or a ControlNet",
            )
        asked = read(self.beside, request.conditions)
        source = as_labels(request.mask or self._unknown(asked)).canonical()
        self.mask.read(torch.from_numpy(source.array.astype(np.int64)))
        asked = within(self.beside, asked, source.grid)
        outside = [] if request.mask is None else self.envelope.check(source, allow=allow_extrapolation)
        outside += self._check_unknown(source, allow=allow_extrapolation)
        outside += check_asked(self.beside, asked, allow=allow_extrapolation)
        grid = self.grid.synthesis_grid(source.grid, [step * self.network.multiple for step in self.mask.factors])
        placed = {name: kind.place(asked[name], grid) for name, kind in self.beside.items()}
        return PreparedMask(request, source, grid, placed, outside)

    def _check_unknown(self, labels: Volume, *, allow: bool) -> list[str]:
        """A mask that asks for nothing, of a network that never saw one."""
        if not self.network.sees_mask or self.mask_dropout != 0 or not (labels.array == UNKNOWN_LABEL).all():
            return []
        finding = "nothing is asked of the mask (training always showed one, as mask_dropout was 0)"
        if not allow:
            raise FibldmError(
                f"a mask must lie within what the training data covered; {finding}",
                "train with mask_dropout above 0, or give `allow_extrapolation` (the sidecar will say so)",
            )
        return [finding]

    def _unknown(self, asked: Mapping[str, Any]) -> Volume:
        """A mask that asks for nothing, of the grid that another condition brings, else of the model grid."""
        brought = (self.beside[name].brings_grid(value) for name, value in asked.items())
        if (grid := next((grid for grid in brought if grid is not None), None)) is not None:
            return Volume(np.full(grid.shape, UNKNOWN_LABEL, dtype=np.uint8), grid.affine)
        shift = -(np.array(self.grid.size) - 1) / 2 * self.grid.spacing  # centred, as no patient's place is known
        affine = from_matvec(np.diag(self.grid.spacing), shift)
        return Volume(np.full(self.grid.size, UNKNOWN_LABEL, dtype=np.uint8), affine)

    def finished(self, placed: PreparedMask, decoded: NDArray[np.float32], settings: SamplingSettings) -> Synthesis:
        """Back from the model grid ``(C, X, Y, Z)`` to the mask's own, and to the units on disk."""
        source, grid = placed.source, placed.grid
        returned = [resample(Volume(part, grid.affine), source.grid, kind="image").array for part in decoded]
        on_disk = self.intensity.to_disk(np.stack(returned))
        own_grid = source.grid if placed.request.mask is None else placed.request.mask.grid
        channels = tuple(turned_like(replace(source, array=part), own_grid) for part in on_disk)
        return Synthesis(channels, self.provenance(placed, settings, calls=settings.calls_on(self.process)))

    def provenance(self, prepared: PreparedMask, settings: SamplingSettings, *, calls: int) -> dict[str, Any]:
        """Where a volume comes from, JSON-able.

        Args:
            prepared: its mask.
            settings: as they were followed.
            calls: of the network, on the whole latent.
        """
        request, grid = prepared.request, prepared.grid
        same_spacing = bool(np.allclose(grid.spacing, prepared.source.grid.spacing))
        further = {name: kind.recorded(prepared.asked[name]) for name, kind in self.beside.items()}
        tiles = self.tiles(prepared, settings)
        covariates = further.pop("covariates")
        return {
            "fibldm": fibldm.__version__,
            "torch": torch.__version__,
            "source": self.source,
            **({"choice": dict(self.choice)} if self.choice else {}),
            **({"distilled": self.student.to_dict()} if self.student is not None else {}),
            "number": request.number,
            "sampling": settings.to_dict(),
            "covariates": covariates,
            **({"conditions": further} if further else {}),
            "follows_mask": request.mask is not None,
            "network_calls": calls if tiles is None else calls * len(tiles.windows),
            **({} if tiles is None else {"tiles": tiles.told()}),
            "channels": list(self.channels),
            "intensity": self.intensity.to_dict(),
            "units": self.intensity.units,
            "grid": {"size": list(grid.shape), "spacing_mm": list(grid.spacing), "resampled": not same_spacing},
            "extrapolation": prepared.outside,
            "mark": self.mark_of(settings),
            "notice": NOTICE if request.mask is not None else UNCONDITIONAL_NOTICE,
        }

    def mark_of(self, settings: SamplingSettings) -> dict[str, Any]:
        """How the voxels themselves are marked, see `Mark.recorded`; or ``voxels`` false, and ``why``.

        Args:
            settings: as `as_trained` gives them.
        """
        if self.residual_noise is None or not self.residual_noise.levels.any():
            return {"voxels": False, "why": "this generator draws no residual noise"}
        if self.mark is None or not settings.residual_noise:
            return {"voxels": False, "why": "residual_noise is 0" if self.mark else "it was left out"}
        return self.mark.recorded()

    def as_trained(self, settings: SamplingSettings) -> SamplingSettings:
        """Settings with the shift of the training times where they give none, and no noise that is not known.

        Raises:
            FibldmError: a dynamic threshold is asked of latents, or of a distilled network what it was not trained for.
        """
        if self.student is not None:
            self.student.check(settings, self.shift)
        known = {"latents": not self.first_stage.is_identity, "residual_noise": self.residual_noise is not None}
        return settings.as_trained(shift=self.shift, **known)

    def denoiser(self, prepared: Sequence[PreparedMask]) -> Denoiser:
        """What the network says of latents of masks of one size, without guidance."""
        return self._denoiser(self._encoded(prepared, self._labels(prepared)))

    @torch.no_grad()
    def draw_latents(
        self,
        prepared: Sequence[PreparedMask],
        generators: Sequence[torch.Generator],
        settings: SamplingSettings,
        known: KnownLatents | None = None,
    ) -> Tensor:
        """Normalised latents ``(B, C, x, y, z)`` of masks of one size, by settings as `as_trained` gives them.

        Args:
            prepared: by this synthesizer.
            generators: of all that is random, one for each.
            settings: how to sample.
            known: cells that stay as they are; None draws all.
        """
        drawn = self._labels(prepared)
        given = self._encoded(prepared, drawn)
        cells = [length // step for length, step in zip(drawn.shape[2:], self.mask.factors, strict=True)]
        noise = draw_noise((len(self.space.mean), *cells), generators).to(drawn.device)
        nothing = {name: self.conditions[name].null(part) for name, part in given.items()}
        asked, null = self._denoiser(given), self._denoiser(nothing)
        tiles = self._tiles_of(cells, settings)

        def over(denoiser: Denoiser) -> Denoise:
            return denoiser if tiles is None else tiles.around(partial(denoiser.within, cells=cells))

        denoise = settings.guide(over(asked), over(null), over(asked.beside(null)))
        if settings.dynamic_threshold is not None:
            denoise = thresholded(denoise, self.space, settings.dynamic_threshold)
        sampler = partial(settings.draw, process=self.process, generators=generators)
        times = settings.times(self.process)
        if known is None:
            return sampler(denoise, noise, times)
        return known.draw(sampler, denoise, noise, times, process=self.process, generators=generators)

    @torch.no_grad()
    def decode(self, z: Tensor, prepared: PreparedMask) -> Tensor:
        """The volume ``(C, X, Y, Z)`` of a normalised latent ``(1, C, x, y, z)``, on the model grid of its mask."""
        mask = None
        if self.first_stage.needs_mask:
            mask = MaskEncoding(self.mask.labels, compression=1).encode(self._labels([prepared]))
        return tiled_decode(self.first_stage, self.space.denormalise(z), mask=mask)[0].float()

    def _sample(self, placed: Sequence[PreparedMask], settings: SamplingSettings) -> list[NDArray[np.float32]]:
        """Decoded volumes ``(C, X, Y, Z)`` of masks of one size, on the model grid, in ``[-1, 1]``."""
        generators = [part.request.generator(settings.seed) for part in placed]
        z = self.draw_latents(placed, generators, settings)
        decoded = [self.decode(z[place : place + 1], part) for place, part in enumerate(placed)]
        if settings.residual_noise and self.residual_noise is not None:
            pairs = zip(decoded, generators, strict=True)
            decoded = [
                part + settings.residual_noise * self.residual_noise.draw(part, own, self.mark) for part, own in pairs
            ]
        return [part.clamp(-1, 1).cpu().numpy() for part in decoded]

    def _labels(self, placed: Sequence[PreparedMask]) -> Tensor:
        """Of masks of one size, on their model grids, ``(B, 1, X, Y, Z)`` where the network is."""
        labels = [resample(part.source, part.grid, kind="label", fill=UNKNOWN_LABEL).array for part in placed]
        device = next(self.network.parameters()).device
        return torch.from_numpy(np.stack(labels).astype(np.int64)[:, None]).to(device)

    def _encoded(self, placed: Sequence[PreparedMask], drawn: Tensor) -> dict[str, Tensor]:
        """What the network is given of each condition that it sees, ``(B, ...)``."""
        values = {name: drawn if name == "mask" else [part.asked[name] for part in placed] for name in self.conditions}
        seen = {name: kind for name, kind in self.conditions.items() if name in self.network.sees}
        return {name: kind.encode(values[name]).to(drawn.device) for name, kind in seen.items()}

    def tiles(self, prepared: PreparedMask, settings: SamplingSettings) -> JointTiles | None:
        """The tiles in which a volume is drawn; None where it is drawn whole."""
        cells = [length // step for length, step in zip(prepared.grid.shape, self.mask.factors, strict=True)]
        return self._tiles_of(cells, settings)

    def _tiles_of(self, cells: Sequence[int], settings: SamplingSettings) -> JointTiles | None:
        steps = [step * self.network.multiple for step in self.mask.factors]
        trained = [
            -(-length // step) * step // factor
            for length, step, factor in zip(self.grid.size, steps, self.mask.factors, strict=True)
        ]
        if self.grid.size[2] == 1:
            trained[2] = 1
        return JointTiles.plan(cells, trained) if settings.tiles else None

    def _denoiser(self, conditions: Mapping[str, Tensor]) -> Denoiser:
        return Denoiser(self.network, self.process, self.target, conditions)
