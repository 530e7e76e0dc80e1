"""The generator that serves, and what is asked of all that arrives."""

from pathlib import Path
from typing import Any

import torch

from fibldm.errors import FibldmError
from fibldm.synthesis import Output, SynthesisSettings, Synthesizer
from fibldm.synthesis.asked import check, read


def serving_output(bundle: Path, folder: Path, *, device: str | None = None, **options: Any) -> Output:
    """The output of a bundle; whatever can be refused before the first item is refused here.

    Args:
        bundle: folder or zip of ``fibldm export``; its files are compared with its manifest.
        folder: of the results.
        device: None takes CUDA where there is one.
        **options: of `SynthesisSettings` by their names, over those that the bundle was measured with.

    Raises:
        FibldmError: the bundle or an option is refused, or the generator follows no masks.
    """
    _ = SynthesisSettings.of(**options).files.dicom  # what is refused is so before weights are read
    synthesizer = Synthesizer.from_bundle(bundle, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = SynthesisSettings.of(synthesizer.sampling, **options)
    check(synthesizer.beside, read(synthesizer.beside, settings.asked), allow=settings.allow_extrapolation)
    if not synthesizer.network.sees_mask:
        raise FibldmError("what serves must be a bundle that follows masks; this one was trained without", "another")
    return Output(synthesizer, folder, settings)


def facts_of(output: Output) -> dict[str, Any]:
    """What decides the volumes of any mask: the generator, and what is asked of all."""
    generator, dicom, asked = output.synthesizer, output.dicom, output.settings
    return {
        "source": generator.source,
        "sampling": asked.sampling.to_dict(),
        "allow_extrapolation": asked.allow_extrapolation,
        "count": asked.count,
        **{name: part for name in ("covariates", "conditions") if (part := dict(getattr(asked, name)))},
        **({"check": asked.check} if asked.check is not None else {}),
        **({"reject_copies": asked.known_scans.fingerprint} if asked.known_scans is not None else {}),
        "dicom": dicom.fingerprint(generator.names) if dicom is not None else None,
    }
