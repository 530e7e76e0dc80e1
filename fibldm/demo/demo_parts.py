"""The demo's figures as sections of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from fibldm.report.parts import Part, Table

_OF_CASES = {
    "lung Dice": ("lung_dice", 3),
    "real": ("lung_dice_real", 3),
    "shuffled": ("lung_dice_shuffled", 3),
    "contrast": ("fibrosis_contrast_ratio", 2),
    "texture, lung": ("texture_ratio_lung", 2),
    "texture, fibrosis": ("texture_ratio_fibrosis", 2),
}
_HOW = ("figure", "value", "how to read it")


def demo_parts(figures: Mapping[str, Any], commands: Sequence[str]) -> list[Part]:
    """Sections for a report.

    Args:
        figures: content of the demo's ``metrics.json``.
        commands: that do the same, one line each.
    """
    return [
        Part("Figures of phantoms", tables=[Table("Figures of phantoms", _HOW, _means(figures))]),
        Part("Every mask", tables=[Table("Every mask", ("mask", *_OF_CASES), _cases(figures["cases"]))]),
        Part("Commands", ["The same, step by step:"], code=list(commands)),
    ]


def _means(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    dice = f"air-dense voxels against the lung labels; real volumes reach {figures['lung_dice_real']:.3f}"
    contrast = "fibrosis minus healthy lung in HU, by that of the real volume; 1 is right"
    shuffled = "the same against another patient's mask; must be well below"
    return [
        ("lung Dice", f"{figures['lung_dice']:.3f}", dice),
        ("shuffled", f"{figures['lung_dice_shuffled']:.3f}", shuffled),
        ("fibrosis contrast", f"{figures['fibrosis_contrast_ratio']:.2f}", contrast),
        ("texture", f"{figures['texture_ratio']:.2f}", "standard deviation within labels by the real one; 1 is right"),
        (
            "spread between seeds",
            f"{figures['seed_ratio']:.2f}",
            "by the real texture; 0 would mean one volume per mask",
        ),
        ("network calls", str(figures["network_calls"]), "per volume"),
        ("volumes", str(len(figures["outputs"])), f"of {len(figures['masks'])} masks of test patients"),
    ]


def _cases(cases: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [(str(case["case"]), *(_said(case, *about) for about in _OF_CASES.values())) for case in cases]


def _said(case: Mapping[str, Any], key: str, digits: int) -> str:
    if key in case:
        return f"{case[key]:.{digits}f}"
    return "no fibrosis" if key == "fibrosis_contrast_ratio" else ""
