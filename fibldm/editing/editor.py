"""A scan, a mask of what it should show, and a region: the region drawn anew, all else as it was."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from nibabel.affines import apply_affine, from_matvec
from numpy.typing import NDArray
from torch.nn import functional as F

from fibldm.editing.blending import blended
from fibldm.editing.region import Region, check_same_grid
from fibldm.errors import FibldmError
from fibldm.models.inpainting import KnownLatents
from fibldm.models.tiling import tiled_encode
from fibldm.synthesis import PreparedMask, SamplingSettings, SynthesisRequest, Synthesizer
from fibldm.synthesis.asked import meant
from fibldm.typed_settings import counted
from fibldm.volumes.grid import Grid, Volume, resample, turned_like
from fibldm.volumes.masks import as_labels

NOTICE = "synthetic in part: a region of a patient's scan was drawn anew; all else is the patient's"

_AIR = -1.0  # of the normalised range; as in training, see `ToModelGridd`


@dataclass(frozen=True)
class EditRequest:
    """One edit of a scan.

    Attributes:
        scan: ``(X, Y, Z)`` in the units of the run (HU of CT), in any axis order.
        mask: integer labels that the edited scan is to show, on the voxels of the scan.
        region: what is drawn anew, not 0, on the voxels of the scan.
        name: with the seed and ``number`` it decides the noise.
        number: which of the edits of this scan.
        conditions: see `SynthesisRequest`.
    """

    scan: Volume
    mask: Volume
    region: Volume
    name: str = "scan"
    number: int = 0
    conditions: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class EditSettings:
    """How a region is drawn, beside `SamplingSettings`.

    Attributes:
        strength: see `KnownLatents`; below 1 the scan shines through, and what is drawn is a variation of it.
        resampling: see `KnownLatents`.
        depth: over how many voxels of the scan its own grain fades from the border of the region, above 0.
    """

    strength: float = 1.0
    resampling: int = 0
    depth: float = 3.0

    def __post_init__(self) -> None:
        KnownLatents(torch.empty(0), torch.empty(0), self.strength, self.resampling)  # checks both
        if not self.depth > 0:
            raise FibldmError(f"depth must be above 0 voxels; got {self.depth}", "3 is usual")


@dataclass(frozen=True)
class Edit:
    """An edited scan of the type, grid and axis order of the scan, and where it comes from."""

    volume: Volume
    provenance: dict[str, Any]


@dataclass(frozen=True)
class _Window:
    """The part of a scan around a region that a generator is shown; canonical.

    Attributes:
        place: of it in the scan.
        prepared: its new mask, on the model grid.
        scan: its normalised voxels, not clipped.
        region: its part of the region.
    """

    place: tuple[slice, ...]
    prepared: PreparedMask
    scan: Volume
    region: Region


@dataclass(frozen=True)
class Editor:
    """Draws regions of scans anew with a generator.

    The scan goes through the autoencoder. Latent cells that the region touches are drawn, those around it are known;
    see `KnownLatents`. What is decoded is laid into the scan on the scan's own voxels; see `blended`.

    Attributes:
        synthesizer: of one channel; it must see masks.
    """

    synthesizer: Synthesizer

    def __post_init__(self) -> None:
        if len(self.synthesizer.channels) > 1:
            raise FibldmError(
                f"a scan can be edited by a generator of one channel; this one has {len(self.synthesizer.channels)}",
                "train one for each sequence",
            )
        if not self.synthesizer.network.sees_mask:
            raise FibldmError(
                "an edit follows a mask; this generator was trained without masks",
                "train with --config mask_concat or a ControlNet",
            )

    def __call__(
        self,
        request: EditRequest,
        *,
        settings: SamplingSettings | None = None,
        edit: EditSettings | None = None,
        allow_extrapolation: bool = False,
    ) -> Edit:
        """One edited scan; outside the region every voxel is that of the scan.

        Args:
            request: what to edit.
            settings: how to sample; None for the generator's own.
            edit: how the region is drawn; None for the defaults.
            allow_extrapolation: see `Synthesizer.prepare`.

        Raises:
            FibldmError: mask or region do not lie on the scan, the region is empty, the scan holds a voxel that is not
                finite, the network was distilled, or see `Synthesizer.prepare` and `Synthesizer.draw`.
        """
        edit = edit or EditSettings()
        if self.synthesizer.student is not None:
            raise FibldmError(
                "a region is drawn in many steps, beside what stays; a distilled network draws whole volumes in "
                f"{counted(self.synthesizer.student.calls, 'call')}",
                "edit with its teacher",
            )
        settings = self.synthesizer.as_trained(settings or self.synthesizer.sampling)
        scan, region = request.scan.canonical(), request.region.canonical()
        mask = as_labels(request.mask).canonical()
        check_same_grid(mask, scan.grid, "the mask")
        check_same_grid(region, scan.grid, "the region")
        if not region.array.any():
            raise FibldmError(
                "the region must hold a voxel, or nothing would be drawn; it is empty",
                "name labels that the mask has, or give a mask of the region",
            )
        low, high = self._ends(scan)
        normalised = (scan.array.astype(np.float32) - np.float32(low)) / np.float32(high - low) * 2 - 1
        window = self._window(request, replace(scan, array=normalised), mask, region.array != 0, allow_extrapolation)
        drawn = self._drawn(window, settings, edit)
        array = scan.array.copy()
        units = (drawn.astype(np.float64) + 1) / 2 * (high - low) + low
        array[window.place][window.region] = _as_type(units, array.dtype)[window.region]
        edited = turned_like(replace(scan, array=array), request.scan.grid)
        return Edit(edited, self._provenance(request, window, settings, edit))

    def _ends(self, scan: Volume) -> tuple[float, float]:
        """What becomes -1 and 1: of MR by the scan's own percentiles, and so it also comes back."""
        if not np.isfinite(scan.array).all():
            raise FibldmError("a scan must be finite to be edited; a voxel is not", "export it again")
        low, high = self.synthesizer.intensity.input_range(scan.array.astype(np.float32))
        return float(low), float(high)

    def _window(
        self, request: EditRequest, scan: Volume, mask: Volume, region: Region, allow_extrapolation: bool
    ) -> _Window:
        place = self._place(scan.grid, region)
        shift = from_matvec(np.eye(3), [part.start for part in place])
        affine = scan.affine @ shift

        def part(array: NDArray[Any]) -> Volume:
            return Volume(array[place], affine, scan.space)

        conditions = meant(self.synthesizer.beside, request.conditions, scan.grid)
        asked = SynthesisRequest(part(mask.array), request.name, request.number, conditions)
        prepared = self.synthesizer.prepare(asked, allow_extrapolation=allow_extrapolation)
        return _Window(place, prepared, part(scan.array), region[place])

    def _place(self, scan: Grid, region: Region) -> tuple[slice, ...]:
        """The window: all of a scan that the model grid covers, else as much of it, around the region."""
        covered = np.array(self.synthesizer.grid.size) * self.synthesizer.grid.spacing
        size = np.maximum(np.floor(np.round(covered / scan.spacing, 3)), 1).astype(int)
        places = []
        for axis, (length, whole) in enumerate(zip(size, scan.shape, strict=True)):
            along = np.flatnonzero(region.any(axis=tuple(other for other in range(3) if other != axis)))
            length = min(max(int(length), int(along[-1] - along[0] + 1)), whole)
            start = int(np.clip((along[0] + along[-1] + 1 - length) // 2, 0, whole - length))
            places.append(slice(start, start + length))
        return tuple(places)

    def _drawn(self, window: _Window, settings: SamplingSettings, edit: EditSettings) -> NDArray[np.float32]:
        """The window with its region drawn anew, on the scan's own voxels, normalised."""
        made, grid = self.synthesizer, window.prepared.grid
        scan = resample(replace(window.scan, array=window.scan.array.clip(-1, 1)), grid, kind="image", fill=_AIR)
        volume = torch.from_numpy(scan.array)[None, None].to(next(made.network.parameters()).device)
        z = made.space.normalise(tiled_encode(made.first_stage, volume).mean.to(volume.device))
        touched = resample(
            Volume(window.region.astype(np.float32), window.scan.affine), grid, kind="image", fill=0.0
        ).array
        inside = F.max_pool3d(torch.from_numpy(touched)[None, None], tuple(made.mask.factors)) > 0
        known = KnownLatents(z, inside.to(volume.device), edit.strength, edit.resampling)
        generator = window.prepared.request.generator(settings.seed)
        new = made.draw_latents([window.prepared], [generator], settings, known)
        around, edited = (made.decode(latent, window.prepared).clamp(-1, 1) for latent in (z, new))
        noise = torch.zeros_like(edited)
        if settings.residual_noise and made.residual_noise is not None:
            noise = settings.residual_noise * made.residual_noise.draw(edited, generator, made.mark)
        own = [
            resample(Volume(part[0].cpu().numpy(), grid.affine), window.scan.grid, kind="image").array
            for part in (around, edited, noise)
        ]
        return blended(window.scan.array, own[0], own[1], own[2], window.region, depth=edit.depth)

    def _provenance(
        self, request: EditRequest, window: _Window, settings: SamplingSettings, edit: EditSettings
    ) -> dict[str, Any]:
        made = self.synthesizer
        provenance = made.provenance(window.prepared, settings, calls=self._calls(settings, edit))
        voxels = np.argwhere(request.region.array != 0)
        corners = [voxels.min(0), voxels.max(0)]
        return {
            **provenance,
            "edit": {
                "voxels": len(voxels),
                "share": len(voxels) / request.region.array.size,
                "box_voxels": [corner.tolist() for corner in corners],
                "box_mm": [apply_affine(request.scan.affine, corner).round(3).tolist() for corner in corners],
                "strength": edit.strength,
                "resampling": edit.resampling,
                "depth_voxels": edit.depth,
            },
            "notice": NOTICE,
        }

    def _calls(self, settings: SamplingSettings, edit: EditSettings) -> int:
        return settings.calls_on(self.synthesizer.process) * (1 + edit.resampling)


def _as_type(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind == "f":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.rint(values).clip(limits.min, limits.max).astype(dtype)
