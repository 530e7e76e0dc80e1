"""Between intensities on disk and tensors in ``[-1, 1]``: a named rule, stored once and inverted on output."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform

from fibldm.errors import FibldmError, unknown_choice
from fibldm.files import read_json

Kind = Literal["window", "suv", "percentile", "range"]
Volume = TypeVar("Volume", np.ndarray, torch.Tensor)
Level = float | tuple[float, ...]
"""One number, or one for each channel."""

_FIELDS: dict[str, tuple[str, ...]] = {
    "window": ("low", "high"),
    "suv": ("low", "high"),
    "percentile": ("lower", "upper", "output_low", "output_high"),
    "range": ("low", "high"),
}
_UNITS: dict[str, Literal["HU", "SUV"]] = {"window": "HU", "suv": "SUV"}
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Intensity:
    """How a volume becomes a tensor in ``[-1, 1]``, and how a synthetic tensor becomes a volume again.

    Args:
        kind: ``"window"`` (CT: one fixed window in HU, exact inside, clipped outside), ``"suv"`` (PET: the same in SUV
            by body weight), ``"percentile"`` (MR: the
            percentiles of each volume on the way in, one recorded range of the training split on the way out, so that
            no patient's own range is written; each channel has its own) or ``"range"`` (all else: a range that was
            declared, exact inside, clipped outside).
        low: lower end of the window in HU or SUV, or of the range, of all channels; not of ``percentile``.
        high: upper end of the window in HU or SUV, or of the range, of all channels; not of ``percentile``.
        lower: percentile that becomes -1, in ``[0, 100]``; ``percentile`` only.
        upper: percentile that becomes 1, in ``[0, 100]``; ``percentile`` only.
        output_low: what -1 becomes on output, in arbitrary units; of several channels, one number for each;
            ``percentile`` only.
        output_high: what 1 becomes on output, in the same form; ``percentile`` only.

    Raises:
        FibldmError: unknown kind, ends that are not finite and increasing, or not one of both for each channel.
    """

    kind: Kind
    low: float = -1000.0
    high: float = 1000.0
    lower: float = 0.5
    upper: float = 99.5
    output_low: Level = 0.0
    output_high: Level = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise unknown_choice("intensity kind", self.kind, _FIELDS)
        if self.kind == "window":
            _check_increasing("window in HU", self.low, self.high, _INT16.min, _INT16.max)
        elif self.kind in ("range", "suv"):
            _check_increasing("a window in SUV" if self.kind == "suv" else "a range", self.low, self.high)
        else:
            _check_increasing("percentiles", self.lower, self.upper, 0, 100)
            _check_output(self.output_low, self.output_high)

    @property
    def units(self) -> Literal["HU", "SUV", "arbitrary"]:
        """Units of a volume on disk; SUV are by body weight."""
        return _UNITS.get(self.kind, "arbitrary")

    @property
    def output_dtype(self) -> np.dtype:
        """Voxel type of a written volume: int16 for CT, float32 for all else."""
        return np.dtype(np.int16 if self.kind == "window" else np.float32)

    @property
    def output_range(self) -> tuple[Level, Level]:
        """What -1 and 1 become on output, in ``units``."""
        return (self.output_low, self.output_high) if self.kind == "percentile" else (self.low, self.high)

    def normalise(self, volume: Volume) -> Volume:
        """One volume as float32 in ``[-1, 1]``, linear inside its range and clipped outside; the input is not changed.

        Args:
            volume: one volume of any real dtype, in ``units``: ``(C, X, Y, Z)`` where each channel has its own range,
                else of any shape; a MetaTensor keeps its affine.

        Raises:
            FibldmError: a voxel is not finite, the percentiles of a channel are equal, or there are other channels than
                the rule has.
        """
        values = _finite_float(volume, "a volume to normalise")
        self._check_channels(values)
        low, high = self.input_range(values)
        return ((values - low) / (high - low) * 2 - 1).clip(-1, 1)

    def restore(self, volume: Volume) -> Volume:
        """A tensor as `normalise` gives it as float32 in ``units``; values outside ``[-1, 1]`` are clipped.

        Raises:
            FibldmError: a voxel is not finite, or there are other channels than the rule has.
        """
        values = _finite_float(volume, "a volume to restore").clip(-1, 1)
        self._check_channels(values)
        low, high = (_beside(values, level) for level in self.output_range)
        return (values + 1) / 2 * (high - low) + low

    def to_disk(self, volume: Volume) -> np.ndarray:
        """A tensor in ``[-1, 1]`` as an array in ``units`` and ``output_dtype``; CT is rounded to whole HU.

        Raises:
            FibldmError: as `restore`.
        """
        values = _as_array(self.restore(volume))
        return (np.rint(values) if self.kind == "window" else values).astype(self.output_dtype)

    def to_dict(self) -> dict[str, Any]:
        """What ``intensity.json`` holds: kind, the fields of this kind (lists of several channels), and units."""
        fields = {name: getattr(self, name) for name in _FIELDS[self.kind]}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"kind": self.kind, **plain, "units": self.units}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Intensity":
        """The intensity that ``to_dict`` wrote.

        Raises:
            FibldmError: unknown kind, a missing or non-numeric field, or fields that `Intensity` refuses.
        """
        kind = values.get("kind")
        if kind not in _FIELDS:
            raise unknown_choice("intensity kind", kind, _FIELDS)
        levels = {name: _level(values.get(name), by_channel=name.startswith("output")) for name in _FIELDS[kind]}
        wrong = [name for name, level in levels.items() if level is None]
        if wrong:
            raise FibldmError(
                f"an intensity of kind {kind} must give numbers for {', '.join(_FIELDS[kind])}; "
                f"{', '.join(wrong)} came as {', '.join(repr(values.get(name)) for name in wrong)}"
            )
        return cls(kind=kind, **levels)

    def input_range(self, values: np.ndarray | torch.Tensor) -> tuple[Any, Any]:
        """Lower and upper end of the range that becomes ``[-1, 1]``, of a shape that fits beside ``values``."""
        if self.kind != "percentile":
            return self.low, self.high
        if not isinstance(self.output_low, tuple):
            return percentile_range(values, self.lower, self.upper)
        channels = enumerate(_as_array(values), start=1)
        ranges = [percentile_range(channel, self.lower, self.upper, f"channel {n}") for n, channel in channels]
        low, high = (_beside(values, level) for level in zip(*ranges, strict=True))
        return low, high

    def _check_channels(self, values: np.ndarray | torch.Tensor) -> None:
        """A rule for each channel needs just these; one rule for a volume must not be taken of several together."""
        if self.kind != "percentile":
            return
        channels = len(self.output_low) if isinstance(self.output_low, tuple) else 1
        fits = values.shape[0] == channels if values.ndim == 4 else channels == 1
        if not fits:
            raise FibldmError(
                f"a volume must have as many channels as output_low and output_high of its intensity, {channels}, "
                f"as (C, X, Y, Z); its shape is {tuple(values.shape)}",
                "prepare the data again, with the same channels for every case",
            )


def load_intensity(path: Path | str) -> Intensity:
    """The intensity stored in an ``intensity.json``.

    Raises:
        FibldmError: the file is missing, is not JSON, or holds no intensity.
    """
    return Intensity.from_dict(read_json(Path(path)))


def percentile_range(
    volume: np.ndarray | torch.Tensor, lower: float, upper: float, what: str = "a volume"
) -> tuple[float, float]:
    """The two percentiles, from 0 to 100, of one volume of any shape, in its own units; ``what`` is for the error.

    Raises:
        FibldmError: they are equal, because the volume is constant or nearly so.
    """
    low, high = (float(value) for value in np.percentile(_as_array(volume), (lower, upper)))
    if low >= high:
        raise FibldmError(
            f"percentiles {lower:g} and {upper:g} of {what} must differ; both are {low:g}",
            "leave out a constant volume, crop away empty space, or choose wider percentiles",
        )
    return low, high


class NormaliseIntensityd(MapTransform):
    """MONAI transform: ``Intensity.normalise`` on each key; arrays, tensors and MetaTensors, not in place.

    Volumes are ``(C, X, Y, Z)``; C may be 1.
    """

    def __init__(self, keys: KeysCollection, intensity: Intensity, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.intensity = intensity

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.intensity.normalise(result[key])
        return result


def _check_increasing(what: str, low: float, high: float, least: float = -math.inf, most: float = math.inf) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and least <= low < high <= most):
        bounds = f" within [{least:g}, {most:g}]" if math.isfinite(least) else ""
        raise FibldmError(f"{what} must be finite and increasing{bounds}; got {low:g} and {high:g}")


def _check_output(low: Level, high: Level) -> None:
    lows, highs = (level if isinstance(level, tuple) else (level,) for level in (low, high))
    if type(low) is not type(high) or len(lows) != len(highs) or (isinstance(low, tuple) and len(lows) < 2):
        raise FibldmError(
            f"output_low and output_high must be two numbers, or one of both for each of several channels; "
            f"got {low} and {high}"
        )
    for least, most in zip(lows, highs, strict=True):
        _check_increasing("output_low and output_high", least, most)


def _level(value: object, *, by_channel: bool) -> Any:
    """A number as read from JSON, or a list of them where there may be one for each channel; None for anything else."""
    if isinstance(value, (int, float)):
        return float(value)
    if by_channel and isinstance(value, Sequence) and all(isinstance(part, (int, float)) for part in value):
        return tuple(float(part) for part in value)
    return None


def _beside(values: np.ndarray | torch.Tensor, level: Level) -> Any:
    """A number as it is; numbers of the channels as float32 ``(C, 1, ...)`` that broadcasts with ``values``."""
    if not isinstance(level, tuple):
        return level
    column = np.array(level, dtype=np.float32).reshape(-1, *(1,) * (values.ndim - 1))
    return torch.from_numpy(column).to(values.device) if isinstance(values, torch.Tensor) else column


def _finite_float(volume: Volume, what: str) -> Volume:
    values = _as_float(volume)
    wrong = int((~np.isfinite(_as_array(values))).sum())
    if wrong:
        raise FibldmError(f"{what} must be finite; {wrong} voxels are NaN or infinite")
    return values


def _as_float(volume: Volume) -> Volume:
    if isinstance(volume, torch.Tensor):
        return volume.to(torch.float32)
    with np.errstate(over="ignore"):
        return volume.astype(np.float32)


def _as_array(volume: np.ndarray | torch.Tensor) -> np.ndarray:
    return volume.detach().cpu().numpy() if isinstance(volume, torch.Tensor) else volume
