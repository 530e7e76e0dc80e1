"""Masks from nothing: label maps of a generator that was trained on masks, with the volumes that are asked for."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.files import hash_value, read_json
from fibldm.locks import alone
from fibldm.models.conditions.label_volumes import LabelVolumeEncoding, volume_of
from fibldm.progress import track
from fibldm.shards import Shard
from fibldm.synthesis.checking import DRAWS_AGAIN, seed_of_draw
from fibldm.synthesis.outputs import OutputConflict
from fibldm.synthesis.request import PreparedMask, SynthesisRequest
from fibldm.synthesis.settings import SamplingSettings
from fibldm.synthesis.synthesizer import Synthesizer
from fibldm.volumes.envelope import Envelope
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import sidecar, write_synthetic

NAME = "mask"
"""Of the masks that are drawn; their numbers follow."""

NOTICE = "a synthetic label map, drawn from nothing: it is of no patient, and its place in space says nothing"

_BACKGROUND = 0
_MARGIN = 2  # voxels around labels that are kept, where a field of view is smaller than the model grid
_OF_IMAGES = ("intensity", "units", "channels", "mark", "follows_mask", "covariates", "network_calls")

_logger = logging.getLogger("fibldm")

Range = tuple[float, float]


class EmptyLabels(FibldmError):
    """Masks that were left out, as every draw of them lacked a label."""


@dataclass(frozen=True)
class MaskGenerator:
    """Draws label maps on the model grid.

    Attributes:
        synthesizer: of a run that was trained on masks, see `Synthesizer.from_run`.
        volumes: ml of labels by name, each drawn evenly between two ends; of all other labels they are unknown.
        covariates: further ones that are asked for.
        settings: how to sample; the seed decides asked volumes, too.
        allow_extrapolation: go on, and say so, where what is asked lies outside what the training data covered.

    Raises:
        FibldmError: something is asked that it does not know or that lies outside of training.
    """

    synthesizer: Synthesizer
    volumes: Mapping[str, Range]
    covariates: Mapping[str, object]
    settings: SamplingSettings
    allow_extrapolation: bool = False

    def __post_init__(self) -> None:
        known = [*self._encoding.labels] if self._encoding is not None else []
        if strange := [name for name in self.volumes if name not in known]:
            every = [name for value, name in self.synthesizer.names.items() if value]
            same = [name for name in strange if name in every]
            why = f" (the volume of {', '.join(same)} was the same, or nothing, in all training cases)" if same else ""
            raise FibldmError(
                f"volumes can be asked of {', '.join(known) or 'no label'}; got {', '.join(strange)}{why}",
                "name one of them" if known else "train stage 2 with --config masks_by_volume",
            )
        for name, (low, high) in self.volumes.items():
            if not 0 <= low <= high:
                raise FibldmError(f"a volume must go from at least 0 ml up; that of {name} is {low:g} to {high:g} ml")
        for end in range(2):
            asked = self._covariates({name: ends[end] for name, ends in self.volumes.items()})
            self.synthesizer.prepare(self._request(0, asked), allow_extrapolation=self.allow_extrapolation)

    @property
    def _encoding(self) -> LabelVolumeEncoding | None:
        encoding = self.synthesizer.covariates
        return encoding if isinstance(encoding, LabelVolumeEncoding) else None

    def asked(self, number: int) -> dict[str, float]:
        """The volumes that are asked of a mask, ml by name of the label."""
        return {name: self._between(name, ends, number) for name, ends in self.volumes.items()}

    def draw(self, numbers: Sequence[int]) -> list[tuple[Volume, dict[str, Any]] | list[str]]:
        """Label maps and what their sidecars say; of one whose every draw lacked a label, the names of such labels.

        Drawn again is what has no voxel of a label of which some was asked for, or that every training case has.
        """
        made: dict[int, tuple[Volume, dict[str, Any]]] = {}
        empty: dict[int, list[str]] = {}
        for draw in range(DRAWS_AGAIN + 1):
            left = [number for number in numbers if number not in made]
            settings = replace(self.settings, seed=seed_of_draw(self.settings.seed, draw))
            for number, label_map, prepared in self._drawn(left, settings):
                if lacking := self._lacking(label_map, self.asked(number)):
                    empty[number] = lacking
                else:
                    told = {"draws": draw + 1, **self._provenance(prepared, settings), **self._told(number, label_map)}
                    made[number] = label_map, told
        return [made.get(number) or empty[number] for number in numbers]

    def request(self, number: int) -> str:
        """SHA-256 of all that decides a mask."""
        decisive = [self.synthesizer.source, self.settings.to_dict(), dict(self.covariates), self.asked(number), number]
        return hash_value(decisive)

    @torch.no_grad()
    def _drawn(self, numbers: Sequence[int], settings: SamplingSettings) -> list[tuple[int, Volume, PreparedMask]]:
        if not numbers:
            return []
        drawer, followed = self.synthesizer, self.synthesizer.as_trained(settings)
        requests = [self._request(number, self._covariates(self.asked(number))) for number in numbers]
        prepared = [drawer.prepare(request, allow_extrapolation=self.allow_extrapolation) for request in requests]
        generators = [request.generator(settings.seed) for request in requests]
        latents = drawer.draw_latents(prepared, generators, followed)
        decoded = [drawer.decode(latents[place : place + 1], part) for place, part in enumerate(prepared)]
        maps = [self._label_map(volume.cpu().numpy(), part) for volume, part in zip(decoded, prepared, strict=True)]
        return list(zip(numbers, maps, prepared, strict=True))

    def _label_map(self, probabilities: NDArray[np.float32], prepared: PreparedMask) -> Volume:
        """The most probable labels; what is unknown has no channel."""
        if not np.isfinite(probabilities).all():
            raise FibldmError("a mask must be finite; one is not", "train the generator again, in float32")
        values = np.array([self._values.get(name, _BACKGROUND) for name in self.synthesizer.channels], dtype=np.uint8)
        whole = Volume(values[probabilities.argmax(axis=0)], prepared.grid.affine)
        return cut_to_view(whole, self.synthesizer.envelope)

    def _lacking(self, label_map: Volume, asked: Mapping[str, float]) -> list[str]:
        if self._encoding is None:
            return [] if label_map.array.any() else ["any label"]
        wanted = {name: asked.get(name, 1.0) for name in {**dict.fromkeys(self._encoding.always), **asked}}
        return [name for name, ml in wanted.items() if ml and not (label_map.array == self._values[name]).any()]

    @property
    def _values(self) -> dict[str, int]:
        return {name: value for value, name in self.synthesizer.names.items()}

    def _request(self, number: int, covariates: Mapping[str, object]) -> SynthesisRequest:
        return SynthesisRequest(None, NAME, number, {"covariates": covariates})

    def _covariates(self, volumes: Mapping[str, float]) -> dict[str, object]:
        return {**self.covariates, **{volume_of(name): volume for name, volume in volumes.items()}}

    def _between(self, name: str, ends: Range, number: int) -> float:
        share = int(hash_value([self.settings.seed, NAME, name, number])[:13], 16) / 16**13
        return ends[0] + share * (ends[1] - ends[0])

    def _told(self, number: int, label_map: Volume) -> dict[str, Any]:
        voxel_ml = float(np.prod(label_map.grid.spacing)) / 1000
        got = {name: int((label_map.array == value).sum()) * voxel_ml for value, name in self.synthesizer.names.items()}
        names = {
            str(value): name for value, name in sorted({_BACKGROUND: "background", **self.synthesizer.names}.items())
        }
        return {"labels": names, "volumes_ml": {"asked": self.asked(number), "got": got}, "notice": NOTICE}

    def _provenance(self, prepared: PreparedMask, settings: SamplingSettings) -> dict[str, Any]:
        told = self.synthesizer.provenance(prepared, settings, calls=settings.calls_on(self.synthesizer.process))
        kept = {name: value for name, value in told.items() if name not in _OF_IMAGES}
        return {**kept, "seed": settings.seed, "covariates": dict(self.covariates)}


def cut_to_view(label_map: Volume, envelope: Envelope) -> Volume:
    """A mask without what lies beyond a usual field of view, the middle of those of training, but with all its labels.

    The model grid is as large as the largest of them, and whatever draws volumes from masks saw little of its rim.
    """
    usual = [sum(ends) / 2 for ends in envelope.field_of_view]
    spacing = label_map.grid.spacing
    corners = np.argwhere(label_map.array != _BACKGROUND)
    slices = []
    for axis, length in enumerate(label_map.array.shape):
        kept = min(length, round(usual[axis] / spacing[axis]))
        low = (length - kept) // 2
        high = low + kept
        if len(corners):
            low = min(low, max(int(corners[:, axis].min()) - _MARGIN, 0))
            high = max(high, min(int(corners[:, axis].max()) + 1 + _MARGIN, length))
        slices.append(slice(low, high))
    affine = label_map.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in slices]
    return replace(label_map, array=label_map.array[tuple(slices)], affine=affine)


def synthesize_masks(
    run_dir: str | Path,
    out: str | Path,
    *,
    count: int = 1,
    volumes: Mapping[str, Range] | None = None,
    covariates: Mapping[str, object] | None = None,
    settings: SamplingSettings | None = None,
    allow_extrapolation: bool = False,
    batch_size: int = 4,
    device: str | torch.device | None = None,
    **sampling: Any,
) -> list[Path]:
    """Write label maps ``OUT/mask_000.nii.gz`` with their sidecars; those that lie there already are kept.

    Several processes, as torchrun starts them, share the masks.

    Args:
        run_dir: a finished run of masks.
        out: folder to write to.
        count: of the masks.
        volumes: see `MaskGenerator`, as are ``covariates`` and ``allow_extrapolation``.
        settings: how to sample; None as `SamplingSettings` are by default.
        batch_size: masks that are drawn together.
        device: None takes CUDA where there is one.
        **sampling: fields of `SamplingSettings` by name, over ``settings``.

    Returns:
        What this process wrote, or found there.

    Raises:
        FibldmError: see `MaskGenerator`; the run is not finished or draws volumes, or another process writes to
            ``out``.
        EmptyLabels: masks were left out, as every draw of them lacked a label; the others are written.
    """
    if count < 1 or batch_size < 1:
        raise FibldmError(f"count and batch_size must be at least 1; got {count} and {batch_size}")
    shard = Shard.from_environment()
    on = device or (f"cuda:{shard.local}" if torch.cuda.is_available() else "cpu")
    synthesizer = Synthesizer.from_run(run_dir, unconditional=True, device=on, masks=True)
    chosen = (settings or synthesizer.sampling).changed(**{**sampling, "residual_noise": 0.0})
    generator = MaskGenerator(synthesizer, volumes or {}, covariates or {}, chosen, allow_extrapolation)
    numbers, empty = shard.take(range(count)), dict[int, list[str]]()
    with alone(Path(out) / f".synthesize{shard.suffix}.lock", str(out), "wait until that has ended"):
        missing = [number for number in numbers if not _is_there(Path(out), generator, number)]
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        for batch in track(batches, "masks", shown=shard.is_first):
            for number, made in zip(batch, generator.draw(batch), strict=True):
                if isinstance(made, list):
                    empty[number] = made
                else:
                    facts = {"request": generator.request(number), "number": number, **made[1]}
                    write_synthetic(_file(Path(out), number), made[0], facts, "SYNTHETIC label map by FibLDM")
    if empty:
        raise EmptyLabels(
            f"masks must have some of every label that is asked for or that all training cases have; left out, as no "
            f"draw of {DRAWS_AGAIN + 1} did: "
            + ", ".join(f"{NAME}_{number:03d} (no {', '.join(names)})" for number, names in empty.items()),
            "ask for a larger volume, or train the generator longer",
        )
    return [_file(Path(out), number) for number in numbers]


def _file(out: Path, number: int) -> Path:
    return out / f"{NAME}_{number:03d}.nii.gz"


def _is_there(out: Path, generator: MaskGenerator, number: int) -> bool:
    path = _file(out, number)
    if not path.exists():
        return False
    if not sidecar(path).exists() or read_json(sidecar(path)).get("request") != generator.request(number):
        raise OutputConflict(
            f"{path} lies there already and was made by another run or settings", "choose another `out` folder"
        )
    return True
