"""Updates of low rank and tokens that a stage keeps apart from its weights, for `fibldm.models.adapters`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monai.bundle import ConfigParser
from torch import nn

import fibldm
from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.models.adapters import ADAPTER, OTHER_BASE, frame_of, write_adapter
from fibldm.models.conditions.condition import Condition, present
from fibldm.models.conditions.token import TOKEN
from fibldm.models.low_rank import base_state
from fibldm.models.tokens import VECTORS
from fibldm.runs import StageFolder, hash_weights
from fibldm.runs.stages import kind_of

_logger = logging.getLogger("fibldm")


def require_apart(stage: str, options: Callable[[str], Any], *, tokens: bool = False) -> None:
    """Refuse a training whose updates could not be put on the network of ``init_from``.

    Args:
        stage: its name.
        options: values of ``lora_rank`` and ``lora_full``.
        tokens: whether the network has tokens to learn, beside which it may have no updates.

    Raises:
        FibldmError: volumes are not drawn with the stage, it has no updates, or trains other weights as well.
    """
    if not kind_of(stage).generates:
        raise FibldmError(
            f"an adapter is of a network that volumes are drawn with; got lora_apart at stage {stage}",
            "adapt diffusion or controlnet; an autoencoder stays that of the base (autoencoder_as_given)",
        )
    if not options("lora_rank") and not tokens:
        raise FibldmError("an adapter needs a lora_rank of at least 1; got 0", "2 is usual")
    if options("lora_full"):
        raise FibldmError(
            f"an adapter is updates of low rank alone; lora_full asks for {options('lora_full')} as they are",
            "leave lora_full empty, or set lora_apart to false",
        )


def require_base(source: object, new: Sequence[str], *, tokens: bool = False) -> None:
    """Refuse a base of other weights than the network has without its tokens.

    Args:
        source: value of ``init_from``.
        new: names of the weights that it does not have.
        tokens: whether the network has tokens to learn.

    Raises:
        FibldmError: there are others, or it knows tokens already.
    """
    if missing := [name for name in new if name != VECTORS]:
        raise FibldmError(
            f"an adapter needs all weights of its network from init_from; {source} lacks {', '.join(missing[:5])}",
            "train the network that init_from has, or set lora_apart to false",
        )
    if tokens and VECTORS not in new:
        raise FibldmError(f"a token is learned on a base that knows none; {source} has tokens already", OTHER_BASE)


def keep_adapter(
    folder: StageFolder, parser: ConfigParser, network: nn.Module, best: Mapping[str, Any]
) -> dict[str, str]:
    """Write ``adapter.safetensors`` beside the checkpoint, of the updates that it has added in, and of its tokens.

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
    conditions: dict[str, Condition] = present(get("conditions"))
    token = conditions.pop(TOKEN, None)
    base = {name: weight for name, weight in base_state(network).items() if name != VECTORS}
    facts = {
        "fibldm": fibldm.__version__,
        "stage": folder.name,
        "base": hash_weights(base),
        "rank": get("lora_rank"),
        "alpha": get("lora_alpha"),
        "targets": list(get("lora_weights")),
        "frame": frame_of(
            latents.space,
            get("process"),
            get("target"),
            conditions,
            intensity=known["intensity"],
            spacing=known["grid"]["spacing"],
        ),
        "data": {
            **{key: known[key] for key in ("data", "modality", "licence", "labels")},
            "cases": len(latents.training_cases),
        },
    }
    file = folder.checkpoints / ADAPTER
    names = () if token is None else token.parts
    tokens = dict(zip(names, best["model"][VECTORS], strict=True)) if names else {}
    write_adapter(file, best.get("updates", {}), facts, tokens=tokens)
    size, whole = file.stat().st_size, sum(value.nbytes for value in best["model"].values())
    _logger.info(
        "%s: %s has %.2f MB, %.1f %% of the network's weights", folder.name, file, size / 1e6, 100 * size / whole
    )
    return {"adapter": hash_file(file)}
