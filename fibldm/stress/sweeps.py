"""Sweeps as they are written: ``volume tumour: 1ml 2ml 5ml``."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fibldm.errors import FibldmError, shown, unknown_choice
from fibldm.mask_editing import Anatomy, read_edits
from fibldm.mask_editing.fibrosis import SetFibrosis
from fibldm.mask_editing.labels import ToVolume
from fibldm.mask_editing.words import EDITS
from fibldm.stress.images import Blur, Contrast, ImageChange, Noise
from fibldm.volumes.grid import Volume

IMAGE_CHANGES = {"noise": "noise: 10 20 40", "blur": "blur: 2mm 4mm", "contrast": "contrast LABEL: -40 -20 20"}
"""Changes of the image, and how each is written; all other sweeps are edits of the mask."""


@dataclass(frozen=True)
class Step:
    """One value of a sweep.

    Attributes:
        text: the value as it was written.
        value: the same as a number, by which values are ordered.
        edit: of the mask, as `fibldm.mask_editing.words.EDITS` writes it; None where the image changes.
        change: of the image; None where the mask changes.
    """

    text: str
    value: float
    edit: str | None = None
    change: ImageChange | None = None


@dataclass(frozen=True)
class Sweep:
    """One thing that changes.

    Attributes:
        name: what is written before the values, such as ``volume tumour``.
        steps: its values, in order.
        own: the value that a mask has by itself, by which real scans are laid beside; None where that says nothing.
    """

    name: str
    steps: tuple[Step, ...]
    own: Callable[[Volume], float] | None = None

    def nearest(self, value: float) -> Step | None:
        """The step that a value is closest to; None where it lies outside of the sweep by more than half a step."""
        values = np.array([step.value for step in self.steps])
        if self.name.startswith("volume ") and (values > 0).all() and value > 0:
            values, value = np.log(values), float(np.log(value))
        margins = np.diff(np.sort(values)) / 2 if len(values) > 1 else np.array([0.0])
        if not values.min() - margins[0] <= value <= values.max() + margins[-1]:
            return None
        return self.steps[int(np.abs(values - value).argmin())]


def read_sweeps(texts: Sequence[str], anatomy: Anatomy, modality: str) -> list[Sweep]:
    """Sweeps from their words.

    Args:
        texts: ``WHAT: VALUE VALUE ...`` each; WHAT is an edit of a mask without its value, or of `IMAGE_CHANGES`.
        anatomy: of the work folder, whose labels are named.
        modality: of the images; noise of ``mr`` is that of magnitudes.

    Raises:
        FibldmError: there is none, one has another form, comes twice, or names what there is not.
    """
    if not texts:
        raise FibldmError("at least one sweep must be given; got none", "such as --sweep 'noise: 10 20 40'")
    sweeps = [_read(text, anatomy, modality) for text in texts]
    if len({sweep.name for sweep in sweeps}) < len(sweeps):
        raise FibldmError("a sweep must be given once, with all its values; got one twice")
    return sweeps


def _read(text: str, anatomy: Anatomy, modality: str) -> Sweep:
    name, colon, rest = text.partition(":")
    words, values = name.split(), rest.split()
    kinds = [*IMAGE_CHANGES, *EDITS]
    if not words or words[0] not in kinds:
        raise unknown_choice("a sweep", words[0] if words else text, kinds)
    if not colon or not values or len(set(values)) < len(values):
        form = IMAGE_CHANGES.get(words[0], "EDIT: VALUE VALUE, such as 'volume tumour: 1ml 5ml'")
        raise FibldmError(f"a sweep is written {form}, each value once; got {shown(text)}")
    name = " ".join(words)
    if words[0] in IMAGE_CHANGES:
        changes = [_change(words, value, anatomy, modality, text) for value in values]
        steps = [Step(value, _number(value), change=change) for value, change in zip(values, changes, strict=True)]
        return Sweep(name, _ordered(steps))
    steps = [Step(value, _number(value, index), edit=f"{name} {value}") for index, value in enumerate(values)]
    for step in steps:
        (edit,) = read_edits([str(step.edit)])
    return Sweep(name, _ordered(steps), _own(edit, anatomy))


def _ordered(steps: Sequence[Step]) -> tuple[Step, ...]:
    return tuple(sorted(steps, key=lambda step: step.value))


def _change(words: Sequence[str], value: str, anatomy: Anatomy, modality: str, text: str) -> ImageChange:
    kind, *labels = words
    number = _number(value)
    good = np.isfinite(number) and len(labels) == (kind == "contrast") and (number > 0 or kind == "contrast")
    if not good:
        raise FibldmError(f"a sweep of {kind} is written {IMAGE_CHANGES[kind]}; got {shown(text)}")
    if kind == "noise":
        return Noise(number, rician=modality == "mr")
    return Blur(number) if kind == "blur" else Contrast(anatomy.label(labels[0]), number)


def _number(text: str, otherwise: float = float("nan")) -> float:
    """The number of ``5ml``; of what is several, such as a direction, ``otherwise``."""
    found = re.fullmatch(r"([-+]?\d+(?:\.\d+)?)(?:ml|mm|%)?", text)
    return float(found[1]) if found else otherwise


def _own(edit: object, anatomy: Anatomy) -> Callable[[Volume], float] | None:
    match edit:
        case ToVolume():
            value = anatomy.label(edit.label)
            return lambda mask: float((mask.array == value).sum() * np.prod(mask.grid.spacing) / 1000)
        case SetFibrosis():
            values: Mapping[str, list[int]] = edit.values(anatomy)
            fibrotic = [label for kind, labels in values.items() if kind != "lungs" for label in labels]
            lungs = [*values["lungs"], *fibrotic]
            return lambda mask: float(
                100 * np.isin(mask.array, fibrotic).sum() / max(np.isin(mask.array, lungs).sum(), 1)
            )
    return None
