"""PET in standardised uptake values by body weight: what a slice's values are multiplied with.

SUV = activity per ml (Bq) x body weight (g) / injected activity (Bq), the latter decayed to the time that the slices'
values are corrected to (QIBA, SUV vendor-neutral pseudocode; DICOM PS3.3 C.8.9.1). A body is taken as 1 g per ml, so
that an even distribution is 1 everywhere.

Where the values are corrected to the start of the scan (Decay Correction START), that is Series Date and Time where no
slice was acquired before; of series that were written later it is GE's own scan time, or follows from the Frame
Reference Time of a slice. What is said holds no date, time or weight.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from fibldm.volumes.dicom.frames import Frame, Problem

PHILIPS = (0x70530010, 0x70531000, 0x70531009)
"""The creator of Philips' private block, its factor from counts to SUV, and its factor from counts to Bq/ml."""
GE = (0x00090010, 0x0009100D)
"""The creator of GE's private block, and its date and time of the scan's start."""

_PHILIPS_CREATOR, _GE_CREATOR = "Philips PET Private Group", "GEMS_PETD_01"
_WEIGHT_KG = (0.005, 500.0)
_DOSE_BQ = (1e5, 1e11)
"""From a mouse's dose to a generator's largest; MBq lie far below."""
_HALF_LIVES = 10.0
_DAY = timedelta(days=1)
_SAME_TIME = timedelta(minutes=1)
_ASK = "export the original series with it, or give a NIfTI file in SUV"
_CONTRADICTORY = "see which is right, and correct it with the scanner's or archive's export"


class _Unknown(Exception):
    """Why there is no factor."""

    def __init__(self, reason: str, remedy: str = _ASK) -> None:
        super().__init__(reason)
        self.problem: Problem = (reason, remedy)


@dataclass(frozen=True)
class _Injection:
    """Activity in Bq and half-life in s, and when it was given: date and time, or the time of day alone."""

    dose: float
    half_life: float
    moment: datetime
    dated: bool


def suv_problems(frames: Sequence[Frame]) -> Iterator[Problem]:
    """What keeps slices of PET from being brought to SUV by body weight; nothing where nothing does."""
    try:
        suv_factors(frames)
    except _Unknown as unknown:
        yield unknown.problem


def suv_factors(frames: Sequence[Frame]) -> list[float]:
    """What the rescaled values of each frame are multiplied with, in their order; see `suv_problems`."""
    units = _alike(frames, "Units", "units").upper()
    if units == "GML":
        kind = _alike(frames, "SUVType", "SUV types", empty=True).upper()
        if kind not in ("", "BW"):
            raise _Unknown(f"its SUV are by {kind}, and not by body weight (SUV Type BW)")
        return [1.0] * len(frames)
    if units == "CNTS":
        return _philips(frames)
    if units != "BQML":
        raise _Unknown(f"its units are {units}, and neither BQML nor GML (nor CNTS of Philips)")
    return _by_weight(frames)


def _philips(frames: Sequence[Frame]) -> list[float]:
    """Counts: by the factor to SUV, else by that to Bq/ml; it scales the values as stored, as do Rescale Slopes."""
    if any(str(_private(frame, PHILIPS[0]) or "").strip() != _PHILIPS_CREATOR for frame in frames):
        raise _Unknown("its units are counts (CNTS), and it states no factor of Philips' (7053,1000)")
    direct = [_number(_private(frame, PHILIPS[1])) for frame in frames]
    if all(direct):
        return [factor for factor in direct if factor]
    activity = [_number(_private(frame, PHILIPS[2])) for frame in frames]
    if any(direct) or not all(activity):
        raise _Unknown(
            "its units are counts (CNTS), and not all slices state Philips' factor (7053,1000) or (7053,1009)"
        )
    pairs = zip(_by_weight(frames), activity, strict=True)
    return [factor * float(counts) for factor, counts in pairs if counts]


def _by_weight(frames: Sequence[Frame]) -> list[float]:
    corrected = _alike(frames, "CorrectedImage", "corrections").upper().replace("\\", " ").split()
    decay = _alike(frames, "DecayCorrection", "decay corrections").upper()
    if decay not in ("START", "ADMIN", "NONE"):
        raise _Unknown(f"its Decay Correction is {decay}, and none of START, ADMIN and NONE")
    if "ATTN" not in corrected:
        raise _Unknown("it is not corrected for attenuation (Corrected Image), and its values are no activity")
    if ("DECY" in corrected) != (decay != "NONE"):
        said = "names" if "DECY" in corrected else "does not name"
        reason = f"its Decay Correction is {decay}, but its Corrected Image {said} DECY"
        raise _Unknown(reason, _CONTRADICTORY)
    weight = _within(frames, "PatientWeight", "Patient's Weight", _WEIGHT_KG, "kg")
    injection = _injection(frames)
    if decay == "ADMIN":
        return [weight * 1000 / injection.dose] * len(frames)
    if decay == "START":
        return [_factor(weight, injection, _start(frames))] * len(frames)
    return [_factor(weight, injection, _acquired(frame) + _mean_time(frame, injection.half_life)) for frame in frames]


def _factor(weight: float, injection: _Injection, moment: datetime) -> float:
    """Of values at a moment."""
    elapsed = (moment - _given(injection, moment)).total_seconds()
    if elapsed < 0:
        raise _Unknown("it states an injection after the scan", _CONTRADICTORY)
    if elapsed > _HALF_LIVES * injection.half_life:
        half_lives = elapsed / injection.half_life
        reason = f"it states an injection {half_lives:.3g} half-lives before the scan, more than {_HALF_LIVES:g}"
        raise _Unknown(reason, _CONTRADICTORY)
    return weight * 1000 / (injection.dose * 2 ** (-elapsed / injection.half_life))


def _given(injection: _Injection, moment: datetime) -> datetime:
    """When: a time without a date is the last one before the scan, so that midnight may lie between."""
    if injection.dated:
        return injection.moment
    same_day = datetime.combine(moment.date(), injection.moment.time())
    return same_day if same_day <= moment else same_day - _DAY


def _injection(frames: Sequence[Frame]) -> _Injection:
    stated = [frame.header.get("RadiopharmaceuticalInformationSequence") for frame in frames]
    if not all(stated):
        raise _Unknown("it does not state its Radiopharmaceutical Information")
    if any(len(items or ()) > 1 for items in stated):
        raise _Unknown("it states several radiopharmaceuticals")
    parts = [Frame(frame.file, frame.index, (items or [None])[0]) for frame, items in zip(frames, stated, strict=True)]
    dose = _within(parts, "RadionuclideTotalDose", "Radionuclide Total Dose", _DOSE_BQ, "Bq")
    half_life = _within(parts, "RadionuclideHalfLife", "Radionuclide Half Life", (1.0, 1e7), "s")
    whole = _alike(parts, "RadiopharmaceuticalStartDateTime", "start times of the radiopharmaceutical", empty=True)
    time = _alike(parts, "RadiopharmaceuticalStartTime", "start times of the radiopharmaceutical", empty=True)
    if not whole and not time:
        raise _Unknown("it does not state its Radiopharmaceutical Start Time or Start DateTime")
    if not whole:
        return _Injection(dose, half_life, _moment("19000101", time, "Radiopharmaceutical Start Time"), dated=False)
    moment = _moment(whole[:8], whole[8:].split("+")[0].split("-")[0], "Radiopharmaceutical Start DateTime")
    if time:
        other = _moment(whole[:8], time, "Radiopharmaceutical Start Time")
        if abs(moment - other) > _SAME_TIME:
            raise _Unknown("its Radiopharmaceutical Start Time and Start DateTime differ", _CONTRADICTORY)
    return _Injection(dose, half_life, moment, dated=True)


def _start(frames: Sequence[Frame]) -> datetime:
    """When the scan began, to which all slices are corrected."""
    acquired = [_acquired(frame) for frame in frames]
    date, time = (_alike(frames, f"Series{part}", f"series {part.lower()}s", empty=True) for part in ("Date", "Time"))
    if date and time and (series := _moment(date, time, "Series Date and Time")) <= min(acquired):
        return series
    creators = {str(_private(frame, GE[0]) or "").strip() for frame in frames}
    ge = {str(_private(frame, GE[1]) or "").strip() for frame in frames}
    if creators == {_GE_CREATOR} and len(ge) == 1 and (text := ge.pop()):
        return _moment(text[:8], text[8:].split("+")[0].split("-")[0], "scan time (0009,100d)")
    references = [frame.numbers("FrameReferenceTime") for frame in frames]
    if all(value is not None and value[0] > 0 for value in references):
        half_life = _within(
            [Frame(f.file, f.index, f.header.RadiopharmaceuticalInformationSequence[0]) for f in frames],
            "RadionuclideHalfLife",
            "Radionuclide Half Life",
            (1.0, 1e7),
            "s",
        )
        starts = [
            moment - timedelta(milliseconds=reference[0]) + _mean_time(frame, half_life)
            for moment, reference, frame in zip(acquired, references, frames, strict=True)
            if reference is not None
        ]
        if max(starts) - min(starts) > _SAME_TIME:
            raise _Unknown("its slices' Frame Reference Times give several times of the scan's start", _CONTRADICTORY)
        return min(starts)
    return min(acquired)


def _acquired(frame: Frame) -> datetime:
    date, time = frame.text("AcquisitionDate"), frame.text("AcquisitionTime")
    if not date or not time:
        raise _Unknown("it does not state its Acquisition Date and Acquisition Time")
    return _moment(date, time, "Acquisition Date and Time")


def _mean_time(frame: Frame, half_life: float) -> timedelta:
    """From a frame's start to the time of its mean count rate: ln(x / (1 - e^-x)) / lambda, x = lambda * duration."""
    duration = frame.numbers("ActualFrameDuration")
    if duration is None or duration[0] <= 0:
        raise _Unknown("it does not state its Actual Frame Duration")
    constant = math.log(2) / half_life
    decay = constant * duration[0] / 1000
    return timedelta(seconds=math.log(decay / -math.expm1(-decay)) / constant)


def _alike(frames: Sequence[Frame], keyword: str, name: str, *, empty: bool = False) -> str:
    """An attribute as text, that all frames state alike."""
    stated = {frame.text(keyword) for frame in frames}
    if len(stated) > 1:
        raise _Unknown(f"it mixes {len(stated)} {name}", _CONTRADICTORY)
    text = stated.pop()
    if not text and not empty:
        raise _Unknown(f"it does not state its {_spaced(keyword)}")
    return text


def _within(frames: Sequence[Frame], keyword: str, name: str, ends: tuple[float, float], unit: str) -> float:
    stated = {frame.numbers(keyword) for frame in frames}
    if None in stated:
        raise _Unknown(f"it does not state its {name}")
    if len(stated) > 1:
        raise _Unknown(f"its slices state {len(stated)} values of {name}", _CONTRADICTORY)
    ((value,),) = [value or (math.nan,) for value in stated]
    if not ends[0] <= value <= ends[1]:
        low, high = ends
        raise _Unknown(f"its {name} is not within {low:g} to {high:g} {unit} (is it in {unit}?)", _CONTRADICTORY)
    return value


def _moment(date: str, time: str, name: str) -> datetime:
    """From DICOM's YYYYMMDD and HHMMSS.FFFFFF, of which minutes and seconds may be left out."""
    whole, _, fraction = time.strip().replace(":", "").partition(".")
    try:
        digits = whole.ljust(6, "0")
        if not whole or len(digits) > 6:
            raise ValueError(name)
        second = datetime.strptime(date.strip().replace(".", "") + digits, "%Y%m%d%H%M%S")
        return second + timedelta(seconds=float(f"0.{fraction or 0}"))
    except ValueError:
        raise _Unknown(f"its {name} cannot be read as date and time") from None


def _private(frame: Frame, tag: int) -> object:
    element = frame.header.get(tag)
    return None if element is None else element.value


def _number(value: object) -> float | None:
    """A positive number of a private attribute, which may come as bytes; ``None`` for anything else."""
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    try:
        number = float(text.strip(" \0"))
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _spaced(keyword: str) -> str:
    return "".join(f" {letter}" if letter.isupper() else letter for letter in keyword).strip()
