"""What datasets call their modality, and which of ours that is."""

from fibldm.datasets.source import Source

MODALITIES = ("ct", "mr", "pt", "other")

_NAMES = {
    "ct": "ct",
    **dict.fromkeys(("pt", "pet", "suv"), "pt"),
    **dict.fromkeys(("mr", "mri", "t1", "t1w", "t1gd", "t1c", "t2", "t2w", "flair", "pd", "adc", "dwi"), "mr"),
}


def stated_modality(source: Source) -> str | None:
    """``ct``, ``mr`` or ``pt`` where all channels say the same."""
    stated = {_NAMES.get(name.strip().lower()) for name in (source.modality or "").split(",")}
    return stated.pop() if len(stated) == 1 else None
