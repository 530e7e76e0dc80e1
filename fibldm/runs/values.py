"""What the values of a stage's configuration must be, told before anything is made of them."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fibldm.errors import FibldmError

_EVALUATED = ("$", "@", "%")

# The least of each.
_WHOLE = {
    **dict.fromkeys("accumulation_steps batch_size checkpoint_every steps val_interval views".split(), 1),
    **dict.fromkeys("covariate_width latent_channels patches_per_case preview_steps validation_times".split(), 1),
    **dict.fromkeys("spade_channels unet_norm_groups".split(), 1),
    **dict.fromkeys(
        "keep_every lora_rank num_workers patience preview_every preview_metrics seed warmup_steps".split(), 0
    ),
    **dict.fromkeys("covariate_frequencies validation_patches_per_case wavelet_levels".split(), 0),
    "epochs": 0,  # networks with nothing to learn have none
}
_NOT_NEGATIVE = frozenset("clip_norm codebook_weight kl_weight learning_rate perceptual_weight spectral_weight".split())
_SHARES = frozenset("ema_momentum foreground_patches label_dropout mask_dropout subset".split())
_SWITCHES = frozenset(
    "activation_checkpointing init_strict init_trust log_variance lora_apart masks_only".split()
    + "restart tf32 watch_training".split()
)
_CAPITALS = "`python -m monai.bundle run` takes True and False; true and false are texts to it, which all count as true"
_SIZES = frozenset(["patch", "size"])


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse values that no stage can use; expressions and references are fine, as they are evaluated later.

    Raises:
        FibldmError: names every key with what it must be and what came.
    """
    wrong = [
        f"{key} must be {must}; got {values[key]!r}"
        for key, (must, fits) in _RULES.items()
        if key in values and not _is_evaluated(values[key]) and not fits(values[key])
    ]
    if wrong:
        texts = any(isinstance(values.get(key), str) for key in _SWITCHES)
        raise FibldmError("\n".join(wrong), _CAPITALS if texts else "")


def require_switches(**values: Any) -> None:
    """Refuse what is neither True nor False, such as the text "false", which would count as true.

    Raises:
        FibldmError: names the first that is something else.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise FibldmError(f"{name} must be true or false; got {value!r}", _CAPITALS)


def require_minutes(value: Any) -> None:
    """Refuse a time budget that is none; None, and what is evaluated later, are fine.

    Raises:
        FibldmError: it is no number above 0.
    """
    if value is not None and not _is_evaluated(value) and not (_is_number(value) and value > 0):
        raise FibldmError(f"minutes must be a number above 0; got {value!r}", "leave it out to train all epochs")


def _is_evaluated(value: Any) -> bool:
    """Whether it, or a value in it, is known only when it is evaluated."""
    if isinstance(value, list):
        return any(map(_is_evaluated, value))
    return isinstance(value, str) and value.startswith(_EVALUATED)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_three(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(fits, value))


def _rules() -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """What is said of each key, and whether a value is so."""
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "spacing": (
            "three numbers above 0 (mm), such as [1.0, 1.0, 2.0]",
            lambda value: _are_three(value, lambda part: _is_number(part) and part > 0),
        )
    }
    for key in _SIZES:
        rules[key] = (
            "three whole numbers of at least 1 (voxels), such as [64, 64, 32]",
            lambda value: _are_three(value, lambda part: _is_whole(part, 1)),
        )
    for key, least in _WHOLE.items():
        rules[key] = (f"a whole number of at least {least}", partial(_is_whole, least=least))
    for key in _NOT_NEGATIVE:
        rules[key] = ("a number of at least 0", lambda value: _is_number(value) and value >= 0)
    for key in _SHARES:
        rules[key] = ("a number from 0 to 1", _is_share)
    rules["covariate_dropout"] = (
        "a number from 0 to 1, or such numbers by name",
        lambda value: _is_share(value) or (isinstance(value, Mapping) and all(map(_is_share, value.values()))),
    )
    for key in _SWITCHES:
        rules[key] = ("true or false", lambda value: isinstance(value, bool))
    return rules


_RULES = _rules()
