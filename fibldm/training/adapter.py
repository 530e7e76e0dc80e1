"""Updates of low rank that a stage keeps apart from its weights, for `fibldm.models.adapters`."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from monai.bundle import ConfigParser
from torch import nn

import fibldm
from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.models.adapters import ADAPTER, frame_of, write_adapter
from fibldm.models.low_rank import base_state
from fibldm.runs import StageFolder, hash_weights
from fibldm.runs.stages import kind_of

_logger = logging.getLogger("fibldm")


def require_apart(stage: str, options: Callable[[str], Any]) -> None:
    """Refuse a training whose updates could not be put on the network of ``init_from``.

    Args:
        stage: its name.
        options: values of ``lora_rank`` and ``lora_full``.

    Raises:
        FibldmError: volumes are not drawn with the stage, it has no updates, or trains other weights as well.
    """
    if not kind_of(stage).generates:
        raise FibldmError(
            f"an adapter is of a network that volumes are drawn with; got lora_apart at stage {stage}",
            "adapt diffusion or controlnet; an autoencoder stays that of the base (autoencoder_as_given)",
        )
    if not options("lora_rank"):
        raise FibldmError("an adapter needs a lora_rank of at least 1; got 0", "2 is usual")
    if options("lora_full"):
        raise FibldmError(
            f"an adapter is updates of low rank alone; lora_full asks for {options('lora_full')} as they are",
            "leave lora_full empty, or set lora_apart to false",
        )


def keep_adapter(
    folder: StageFolder, parser: ConfigParser, network: nn.Module, best: Mapping[str, Any]
) -> dict[str, str]:
    """Write ``adapter.safetensors`` beside the checkpoint, of the updates that it has added in.

    Args:
        folder: of the stage.
        parser: of its configuration.
        network: with any updates.
        best: content of ``best.pt``.

    Returns:
        The ``adapter``'s SHA-256, for ``done.json``.
    """
    get = parser.get_parsed_content
    latents = get("latents")
    known = latents.facts
    facts = {
        "fibldm": fibldm.__version__,
        "stage": folder.name,
        "base": hash_weights(base_state(network)),
        "rank": get("lora_rank"),
        "alpha": get("lora_alpha"),
        "targets": list(get("lora_weights")),
        "frame": frame_of(
            latents.space,
            get("process"),
            get("target"),
            get("conditions"),
            intensity=known["intensity"],
            spacing=known["grid"]["spacing"],
        ),
        "data": {
            **{key: known[key] for key in ("data", "modality", "licence", "labels")},
            "cases": len(latents.training_cases),
        },
    }
    file = folder.checkpoints / ADAPTER
    write_adapter(file, best["updates"], facts)
    size, whole = file.stat().st_size, sum(value.nbytes for value in best["model"].values())
    _logger.info(
        "%s: %s has %.2f MB, %.1f %% of the network's weights", folder.name, file, size / 1e6, 100 * size / whole
    )
    return {"adapter": hash_file(file)}
