"""The model card of a bundle: words that a person wrote, and what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from fibldm.delivery.measured import Measured, followed
from fibldm.errors import FibldmError
from fibldm.synthesis.definitions import build
from fibldm.synthesis.student import Student
from fibldm.typed_settings import counted
from fibldm.volumes.gate import MEASURES, gate_of_bundle

_SHOWN = {
    "faithfulness": ("dice", "hd95", "volume_error"),
    "realism": ("kid/radiomics", "spectrum", "ms_ssim"),
    "reconstruction": ("psnr", "ssim", "dice_change"),
    "utility": ("utility", "dice"),
    "gate": ("outside",),
}
OTHER = "other"
"""The modality of microscopy, simulations, shapes: whatever is neither CT, MR nor PET."""

_OTHER_USE = "Research on synthetic images, such as augmentation of training data and tests of software."
_OTHER_LIMITS = (
    "Volumes show what the training data show: other instruments, samples and settings are not known to the model."
)
_REGIONS = 12  # of the ranges, in the card
_AUDIT = {
    "audit": ("copy_rate", "membership_auc", "authenticity/spectrum", "closer_to_training/spectrum"),
    "copies": ("nearest_training_similarity", "closer_than_any_real", "named"),  # of runs of before
}


@dataclass(frozen=True)
class CardText:
    """What a person says of a bundle, in ``export.yaml``.

    Attributes:
        title: of the card.
        description: what the model makes, in a paragraph.
        intended_use: what it is for.
        limits: what it is not for, and what it cannot do.
        attribution: of the training data, as their licence asks for it.
        authors: of the weights.
        references: works that describe data or method.
        tags: for search, beside those that every bundle has.
        text_examples: texts of training that may be shown, as they tell no patient; none is shown by itself.
    """

    title: str = ""
    description: str = ""
    intended_use: str = (
        "Research on synthetic medical images, such as augmentation of training data and tests of software."
    )
    limits: str = (
        "Not for diagnosis or treatment. Volumes show what the training data show: other scanners, ages and diseases "
        "are not known to the model."
    )
    attribution: str = ""
    authors: str = ""
    references: Sequence[str] = ()
    tags: Sequence[str] = ()
    text_examples: Sequence[str] = ()

    @classmethod
    def read(cls, file: Path) -> "CardText":
        """The words of a file, those of every bundle where it is absent or says nothing.

        Raises:
            FibldmError: it is not YAML, or says something else.
        """
        if not file.exists():
            return cls()
        try:
            given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FibldmError(f"{file} must be YAML; {error}") from error
        known = {
            field.name: list if field.name in ("references", "tags", "text_examples") else str for field in fields(cls)
        }
        if not isinstance(given, dict) or any(
            not isinstance(value, known.get(key, ())) for key, value in given.items()
        ):
            listed = ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
            raise FibldmError(f"{file} must hold some of {listed}; it holds {given}")
        return cls(**given)


def card(facts: Mapping[str, Any], words: CardText, measured: Measured, *, size: int) -> str:
    """The card in Markdown, with front matter that model hubs read; ``size`` is that of the weights in bytes."""
    modality = str(facts["modality"])
    if modality == OTHER:
        words = unmedical(words)
    template = (files("fibldm.delivery") / "templates" / "card.md").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    sampling = followed(facts)
    medical, kind = ([], []) if modality == OTHER else (["medical"], [modality])
    tags = [*medical, "synthetic", "3d", "latent-diffusion", *kind, *words.tags]
    once: dict[str, str] = {}
    for tag in tags:
        once.setdefault(tag.lower(), tag)
    front = {"license": facts["licence"].lower(), "library_name": "monai", "tags": list(once.values())}
    return environment.from_string(template).render(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        facts={"further": {}, "adapters": [], "gate": None, **facts},
        ranges=(ranges := _ranges(facts))[:_REGIONS],
        ranges_left_out=len(ranges[_REGIONS:]),
        measures=MEASURES,
        words=words,
        title=words.title or facts["name"],
        covariates={name: _range(known) for name, known in facts["covariates"].items()},
        example=" ".join(f"--covariate {name}={_example(known)}" for name, known in facts["covariates"].items()),
        asked=[*facts["covariates"], *facts.get("further", {})] if facts["sees_mask"] else [],
        labels=", ".join(f"{value} {name}" for value, name in facts["labels"].items()),
        megabytes=f"{size / 1e6:.1f}",
        sampling=sampling.described,
        distilled=student.described if (student := Student.from_dict(facts.get("distilled"))) is not None else "",
        calls=counted(sampling.calls_on(build(facts["process"], "process")), "network call"),
        measured=_rows(measured.figures, _SHOWN),
        ways=measured.ways(sampling),
        audit=_rows(measured.figures, _AUDIT),
        audit_said=measured.figures.get("audit", {}).get("notes", []),
        units=_units(facts["intensity"]),
        subject="subject" if modality == OTHER else "patient",
    )


def _range(known: Mapping[str, Any]) -> str:
    """What may be asked of a covariate, in words."""
    if "values" in known:
        return f"one of {', '.join(known['values'])}"
    return f"a number, {known['low']:g} to {known['high']:g} in training"


def _ranges(facts: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Of the gate: regions in words, with the range of each measure."""
    if (gate := gate_of_bundle(facts)) is None:
        return []
    return [
        (gate.named(channel, region), [_between(part.get(measure)) for measure in MEASURES])
        for channel, regions in gate.ranges.items()
        for region, part in regions.items()
    ]


def _between(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{_number(pair[0])} to {_number(pair[1])}"


def _example(known: Mapping[str, Any]) -> str:
    return str(known["values"][0]) if "values" in known else f"{known['high']:g}"


def unmedical(words: CardText) -> CardText:
    """The words of a bundle that shows no patients, where a person has not said others."""
    usual, said = CardText(), {"intended_use": _OTHER_USE, "limits": _OTHER_LIMITS}
    return replace(words, **{key: text for key, text in said.items() if getattr(words, key) == getattr(usual, key)})


def _units(intensity: Mapping[str, Any]) -> str:
    """What the voxels of a volume are, in words."""
    if intensity["kind"] == "range":
        return f"the units of the training data, from {intensity['low']:g} to {intensity['high']:g} as was declared"
    if intensity["kind"] == "window":
        return f"HU, from {intensity['low']:g} to {intensity['high']:g}"
    if intensity["kind"] == "suv":
        return f"SUV by body weight, from {intensity['low']:g} to {intensity['high']:g}"
    return "arbitrary units, as MR has them"


def _rows(figures: Mapping[str, Any], shown: Mapping[str, Sequence[str]]) -> list[tuple[str, str, str]]:
    """Name, value with its interval, and that of real scans."""
    return [
        (f"{section}: {name}", _value(figure), _number(figure.get("real_vs_real")))
        for section, names in shown.items()
        for name in names
        if (figure := figures.get(section, {}).get("figures", {}).get(name))
    ]


def _value(figure: Mapping[str, Any]) -> str:
    interval = "" if figure.get("low") is None else f" [{_number(figure['low'])}, {_number(figure['high'])}]"
    note = f" ({figure['note']}: n = {figure['n']})" if figure.get("note") else ""
    return f"{_number(figure['value'])}{interval}{note}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
