"""What decides a stage: the keys of its configuration that change an epoch, and the weights it ends with."""

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from fibldm.errors import FibldmError

# Where MONAI's --tracking adds handlers, to engines that have none of their own: parts of keys that decide otherwise.
_TRACKED = ("train_handlers", "val_handlers")


def decisive(config: Mapping[str, Any], rules: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keys of a configuration that change what an epoch computes, by its own word.

    They are all but those listed in its ``not_decisive``, and those that have the value of ``decisive_unless``.

    Args:
        config: keys and values.
        rules: a configuration with these two; None is ``config`` itself. What has none, such as the ``train.json`` of a
            bundle made before there were any, is judged by those that are shipped.

    Raises:
        FibldmError: one of the two is something else.
    """
    names, values = _rules(config if rules is None else rules)
    kept = {key: _untracked(value) for key, value in config.items() if key not in names}
    return {key: value for key, value in kept.items() if key not in values or values[key] != value}


def _rules(config: Mapping[str, Any]) -> tuple[set[str], dict[str, Any]]:
    said = config if "not_decisive" in config else _shipped_rules()
    names, values = said["not_decisive"], said.get("decisive_unless", {})
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FibldmError(
            f"not_decisive must be a list of keys; got {names!r}", "`+not_decisive: [mine]` in a file adds to the list"
        )
    if not isinstance(values, Mapping):
        raise FibldmError(f"decisive_unless must be a mapping of keys to values; got {values!r}")
    return {*names, "not_decisive", "decisive_unless"}, dict(values)


@cache
def _shipped_rules() -> dict[str, Any]:
    from fibldm.runs.config_files import configs_folder, read_configuration

    contents = [read_configuration(file.stem) for file in configs_folder().glob("*.yaml")]
    listed = [name for content in contents for key in ("", "+") for name in content.get(f"{key}not_decisive", ())]
    return {"not_decisive": listed, "decisive_unless": read_configuration("common")["decisive_unless"]}


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
