"""What was measured of the weights that a bundle ships, and the sampling that it therefore draws with by default."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.synthesis import SamplingSettings
from fibldm.synthesis.settings import TOLD_IF_GIVEN

_WITHOUT_VOLUMES = "reconstruction"
_MAY_BE_LEFT_OUT = {"seed", *TOLD_IF_GIVEN}


@dataclass(frozen=True)
class Measured:
    """The figures of ``fibldm evaluate``.

    Attributes:
        figures: sections of ``RUN/evaluation/metrics.json`` by name; perhaps none.
        others: names of the sections that are left out, as they are of other weights.
    """

    figures: Mapping[str, Any]
    others: Sequence[str] = ()

    @classmethod
    def read(cls, run: Path, *, network: str, autoencoder: str) -> "Measured":
        """The figures of a run, as far as they are of some weights, or do not say of which.

        Args:
            run: the run folder.
            network: fingerprint of the weights that make volumes.
            autoencoder: that of the autoencoder.
        """
        file = run / "evaluation" / "metrics.json"
        content: dict[str, Any] = read_json(file) if file.exists() else {}
        others = [
            name
            for name, section in _sections(content).items()
            if _drawn(section).get("weights") not in (None, network)
            or (name == _WITHOUT_VOLUMES and section.get("autoencoder") not in (None, autoencoder))
        ]
        return cls({name: part for name, part in content.items() if name not in others}, others)

    def samplings(self) -> dict[str, SamplingSettings | None]:
        """How the volumes of each section were drawn; None where that is unknown.

        Raises:
            FibldmError: a section does not say it in the terms of this version.
        """
        return {
            name: _settings(name, _drawn(section))
            for name, section in _sections(self.figures).items()
            if name != _WITHOUT_VOLUMES
        }

    def default(self, chosen: Mapping[str, Any], usual: SamplingSettings | None = None) -> SamplingSettings:
        """The sampling that was measured, with what was chosen in its place; where nothing was measured, the usual one.

        Args:
            chosen: settings by name.
            usual: where nothing was measured; None is that of `SamplingSettings`.

        Raises:
            FibldmError: sections were measured with several samplings, and what differs was not chosen; or a setting is
                unknown or out of range.
        """
        known = {name: settings for name, settings in self.samplings().items() if settings is not None}
        names = [field.name for field in fields(SamplingSettings) if field.name != "seed"]
        differing = [
            name for name in names if name not in chosen and len({getattr(one, name) for one in known.values()}) > 1
        ]
        if differing:
            said = "; ".join(
                f"{name} is " + ", ".join(f"{getattr(one, name)} in {section}" for section, one in known.items())
                for name in differing
            )
            raise FibldmError(
                f"figures must be of one sampling, which becomes the bundle's; {said}",
                f"measure all of them again from one folder, or choose by --set {differing[0]}=...",
            )
        seeds = {seed for name in known for seed in _drawn(self.figures[name]).get("seeds", [])}
        measured = {"seed": seeds.pop()} if len(seeds) == 1 else {}
        if known:
            one = next(iter(known.values()))
            measured |= {name: getattr(one, name) for name in names}
        elif usual is not None:
            measured |= {name: getattr(usual, name) for name in names}
        if chosen.get("sampler", measured.get("sampler")) != measured.get("sampler"):
            measured.pop("eta", None)  # which was of the other sampler
        return SamplingSettings.from_dict({**measured, **chosen})

    def ways(self, default: SamplingSettings) -> list[tuple[str, str, bool]]:
        """The samplings of the figures: sections, sampling in words ("" where it is unknown), whether it is another."""
        sections: dict[tuple[str, bool], list[str]] = {}
        for name, one in self.samplings().items():
            other = one is not None and replace(one, seed=0) != replace(default, seed=0)
            sections.setdefault((one.described if one else "", other), []).append(name)
        return [(", ".join(names), words, other) for (words, other), names in sections.items()]

    def notes(self, default: SamplingSettings) -> list[str]:
        """What a person who exports must know about the figures."""
        notes = [
            f"the sampling of the figures of {names} is unknown: it was not recorded; measure again to ship it"
            if not words
            else f"the figures of {names} were measured with {words}, which is not the bundle's default"
            for names, words, other in self.ways(default)
            if other or not words
        ]
        if self.others:
            others = ", ".join(self.others)
            notes.append(f"the figures of {others} are of other weights and were left out; measure again")
        return notes


def followed(facts: Mapping[str, Any]) -> SamplingSettings:
    """The sampling of a bundle by default, as its generator follows it."""
    known = facts["weights"].get("residual_noise") is not None
    return SamplingSettings.from_dict(facts["sampling"]).as_trained(
        shift=facts["shift"], latents=False, residual_noise=known
    )


def _sections(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: part for name, part in content.items() if isinstance(part, Mapping) and "figures" in part}


def _drawn(section: Mapping[str, Any]) -> Mapping[str, Any]:
    return section.get("drawn") or {}


def _settings(name: str, drawn: Mapping[str, Any]) -> SamplingSettings | None:
    given = drawn.get("sampling")
    if given is None:
        return None
    try:
        if missing := {field.name for field in fields(SamplingSettings)} - _MAY_BE_LEFT_OUT - set(given):
            raise FibldmError(f"{', '.join(sorted(missing))} is not said")
        return SamplingSettings.from_dict(given)
    except FibldmError as error:
        raise FibldmError(
            f"metrics.json must say how the volumes of {name} were drawn; {error.message}",
            "synthesize and measure again with this version",
        ) from error
