"""What decides a stage: the keys of its configuration that change an epoch, and the weights it ends with."""

import hashlib
from collections.abc import Mapping
from typing import Any

# Keys of a configuration that change where, how fast or how long a stage runs, but not what an epoch computes.
_NOT_DECISIVE = frozenset(
    "_meta_ activation_checkpointing bundle_root checkpoint_every dataset_dir device epochs finalize imports "
    "init_trust initialize keep_best keep_every limit_val_batches log_every minutes mlflow num_workers patience "
    "preview preview_eta preview_every preview_metrics preview_sampler preview_steps profile restart run run_dir stage "
    "stop_gap trackers training wall_time wandb watch watch_training work "
    # and what MONAI's --tracking adds
    "experiment_name is_not_rank0 output_dir run_name save_execute_config tracking_uri".split()
)


# Keys that came later, with the values that mean what was done before them.
_AS_BEFORE = {"latent_draw": "sample", "masks_only": True}


_TRACKED = ("train_handlers", "val_handlers")  # where it adds handlers, to engines that have none of their own


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that change what an epoch computes."""
    kept = {key: value for key, value in config.items() if key not in _NOT_DECISIVE}
    return {key: _untracked(value) for key, value in kept.items() if key not in _AS_BEFORE or _AS_BEFORE[key] != value}


def _untracked(value: Any) -> Any:
    """Without the handlers that MONAI's --tracking adds to engines."""
    if not isinstance(value, Mapping):
        return value
    return {key: _untracked(part) for key, part in value.items() if not (key in _TRACKED and _is_tracking(part))}


def _is_tracking(handlers: Any) -> bool:
    return isinstance(handlers, list) and all(
        isinstance(handler, Mapping) and handler.get("_target_") == "MLFlowHandler" for handler in handlers
    )


def hash_weights(state: dict[str, Any]) -> str:
    """SHA-256 of the names and values of a state dict: the fingerprint of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every single value of nested ones, by its place in MONAI's notation: ``unet::channels::0``."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {key: leaf for name, part in items for key, leaf in flatten(part, f"{prefix}::{name}".strip(":")).items()}
