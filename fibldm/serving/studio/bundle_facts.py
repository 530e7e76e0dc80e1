"""What the studio tells of its generator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fibldm.serving.service import ASKABLE, Service
from fibldm.serving.studio.limits import Limits
from fibldm.serving.studio.views import BundleView
from fibldm.synthesis.bundle import open_bundle

_CARD = "docs/README.md"


def bundle_view(bundle: Path, service: Service, limits: Limits, examples: Sequence[Path]) -> BundleView:
    """The facts of a bundle, as its files and its generator say them.

    Raises:
        FibldmError: it is refused.
    """
    with open_bundle(bundle) as opened:
        facts = dict(opened.facts)
        card = opened.root / _CARD
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    generator, asked = service.output.synthesizer, service.output.settings
    labels = {int(value): name for value, name in facts["labels"].items()}
    return BundleView(
        name=facts["name"],
        version=facts["version"],
        modality=facts["modality"],
        licence=facts["licence"],
        data_licence=facts["data_licence"],
        labels=labels,
        spacing=list(generator.grid.spacing),
        size=list(generator.grid.size),
        channels=list(generator.channels),
        intensity=generator.intensity.to_dict(),
        sampling=asked.sampling.to_dict(),
        conditions={name: _condition(kind) for name, kind in generator.beside.items() if kind.parts},
        checks=generator.gate is not None,
        card=_without_front_matter(text),
        options=list(ASKABLE),
        limits={"upload": limits.upload, "voxels": limits.voxels, "volumes": service.most, "waiting": limits.waiting},
        examples=[f"mask {number + 1}" for number in range(len(examples))],
    )


def _condition(kind: Any) -> dict[str, Any]:
    return {"what": kind.what, "parts": list(kind.parts), "by_file": kind.of_scan, "facts": kind.facts()}


def _without_front_matter(text: str) -> str:
    """YAML before a card is for hubs."""
    return text.split("\n---\n", 1)[-1].strip() if text.startswith("---\n") else text
