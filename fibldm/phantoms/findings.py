"""Written findings of phantoms: fibrosis of a side, an extent and a pattern, and a sentence that says so.

Findings are drawn apart from the anatomy, so that a patient's body is the same whatever is found in it.
"""

from dataclasses import dataclass, replace

import numpy as np

from fibldm.phantoms.fibrosis import Fibrosis, Side

EXTENTS: dict[str, tuple[float, float]] = {"mild": (0.08, 0.15), "moderate": (0.25, 0.35), "severe": (0.5, 0.62)}
"""Fraction of each lung that is affected."""

PATTERNS: dict[str, tuple[float, float]] = {
    "ground glass": (0.0, 0.1),
    "reticulation": (0.02, 0.88),
    "honeycombing": (0.75, 0.15),
}
"""Shares of honeycombing and reticulation in the fibrosis; the rest is ground glass."""

_SIDES: dict[Side, tuple[str, ...]] = {
    "right": ("the right lung", "the lung on the right"),
    "left": ("the left lung", "the lung on the left"),
    "both": ("both lungs", "the right and the left lung"),
}
_EXTENTS = {"mild": ("mild", "slight"), "moderate": ("moderate", "medium"), "severe": ("severe", "extensive")}
_PATTERNS = {
    "ground glass": ("ground glass", "ground-glass opacities"),
    "reticulation": ("reticulation", "a reticular pattern"),
    "honeycombing": ("honeycombing", "honeycomb cysts"),
}
_SENTENCES = (
    "{extent} fibrosis of {side} with {pattern}.",
    "Fibrosis in {side}, {extent}, mostly {pattern}.",
    "CT shows {extent} fibrosis of {side}; {pattern} prevails.",
    "{pattern} in {side}, {extent}.",
    "Chest CT: fibrosis, {extent}, of {side}, as {pattern}.",
)
_HEALTHY = ("No fibrosis.", "Healthy lungs without fibrosis.", "CT shows no fibrosis of the lungs.")
_HEALTHY_SHARE = 0.1


@dataclass(frozen=True)
class Finding:
    """What is found in a phantom.

    Attributes:
        side: of the patient; None where there is no fibrosis, as are the others then.
        extent: one of `EXTENTS`.
        pattern: one of `PATTERNS`.
        sentence: that says it.
    """

    side: Side | None
    extent: str | None
    pattern: str | None
    sentence: str

    @classmethod
    def draw(cls, seed: int, subject: int) -> "Finding":
        """That of a patient, whatever the number of patients."""
        rng = np.random.default_rng([seed, subject, 0, 1])

        def one(of: tuple[str, ...]) -> str:
            return of[rng.integers(len(of))]

        if rng.uniform() < _HEALTHY_SHARE:
            return cls(None, None, None, one(_HEALTHY))
        side = tuple(_SIDES)[rng.integers(len(_SIDES))]
        extent, pattern = one(tuple(EXTENTS)), one(tuple(PATTERNS))
        words = {"side": one(_SIDES[side]), "extent": one(_EXTENTS[extent]), "pattern": one(_PATTERNS[pattern])}
        sentence = one(_SENTENCES).format(**words)
        return cls(side, extent, pattern, sentence[0].upper() + sentence[1:])

    def applied(self, fibrosis: Fibrosis, rng: np.random.Generator) -> Fibrosis:
        """The disease of a patient as it is found; it does not progress."""
        if self.side is None or self.extent is None or self.pattern is None:
            return replace(fibrosis, extent=0.0, progression=0.0)
        honeycombing, reticulation = PATTERNS[self.pattern]
        return replace(
            fibrosis,
            side=self.side,
            extent=rng.uniform(*EXTENTS[self.extent]),
            progression=0.0,
            honeycombing=honeycombing,
            reticulation=reticulation,
        )
