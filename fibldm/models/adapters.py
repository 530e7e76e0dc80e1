"""Adapters: updates of low rank in a file of their own, put on the network that they were learned on by any strength.

The file is safetensors: of every weight that is moved ``<layer>.lora_a`` ``(r, in)`` and ``<layer>.lora_b``
``(out, r)``, see `fibldm.models.low_rank`, of every token that was learned with them ``token.<name>`` ``(width,)``, see
`fibldm.models.tokens`, and as metadata one text of JSON with what they were learned on. It holds no patient's name and
no path.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.files import hash_file, write_tensors
from fibldm.models.conditions.condition import Condition, present
from fibldm.models.latents import LatentSpace
from fibldm.models.low_rank import moved, scale_of
from fibldm.models.process import Process, Target
from fibldm.runs import hash_weights

FORMAT = 1
ADAPTER = "adapter.safetensors"

OTHER_BASE = "take the run or the bundle that it had as init_from, which knows no tokens"

_KEY = "fibldm_adapter"
_FACTS = frozenset("format base stage rank alpha targets frame data".split())
_PARTS = (".lora_a", ".lora_b")
_TOKEN = "token."
_OWN = "take the run or the bundle that was init_from of its training"
_SHOWN = 80  # letters of a part of a frame
_ASK = "ask for the adapter again, or train it again"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Updates of low rank, and what they were learned on.

    Attributes:
        file: where they lie.
        updates: ``A`` and ``B`` by the name of the weight that they move.
        facts: ``base`` (fingerprint of the weights that were adapted), ``stage``, ``rank``, ``alpha`` (None: the rank),
            ``targets`` (patterns of weights), ``frame`` (see `frame_of`) and ``data``, facts of the training data.
        sha256: of the file.
        tokens: vectors of the tokens that were learned with them, by name, see `fibldm.models.conditions.token`.
    """

    file: Path
    updates: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    facts: Mapping[str, Any]
    sha256: str
    tokens: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, file: str | Path) -> "Adapter":
        """An adapter from its file.

        Raises:
            FibldmError: there is none, or it holds something else.
        """
        file = Path(file)
        if not file.is_file():
            raise FibldmError(f"an adapter must be a file, {ADAPTER} of a stage; {file} is none", "check the path")
        try:
            with safe_open(file, framework="pt") as content:
                told = json.loads((content.metadata() or {}).get(_KEY, "null"))
                tensors = {name: content.get_tensor(name) for name in content.keys()}
        except (SafetensorError, ValueError, UnicodeDecodeError) as error:
            raise FibldmError(f"{file} must be an adapter, which is safetensors; {error}", _ASK) from error
        if not isinstance(told, dict) or told.get("format") != FORMAT or _FACTS - told.keys():
            raise FibldmError(
                f"{file} must be an adapter of this version, as training with --config adapter writes it; it is not",
                "updates of other programs are not read",
            )
        tokens = {name.removeprefix(_TOKEN): tensors.pop(name) for name in sorted(tensors) if _is_token(name)}
        if wrong := [name for name, vector in tokens.items() if vector.ndim != 1 or not bool(vector.isfinite().all())]:
            raise FibldmError(f"tokens must be finite vectors; {', '.join(wrong)} of {file} is none", _ASK)
        if not tensors and not tokens:
            raise FibldmError(f"{file} must hold updates; it holds none", _ASK)
        vectors = {name: vector.float() for name, vector in tokens.items()}
        adapter = cls(file, _paired(file, tensors), told, hash_file(file), vectors)
        _ = adapter.scale
        return adapter

    @property
    def scale(self) -> float:
        """Of its updates at strength 1."""
        rank: int = self.facts["rank"]
        return scale_of(rank, self.facts["alpha"]) if rank else 1.0

    def check(self, state: Mapping[str, Tensor], frame: Mapping[str, Any]) -> None:
        """Refuse a network, or a generator, other than that which was adapted.

        Args:
            state: of the network; ControlNets that came later may be on it.
            frame: of the generator, see `frame_of`.

        Raises:
            FibldmError: it has other layers or weights, or works in another frame; says which.
        """
        for name, (lora_a, lora_b) in self.updates.items():
            needed = (len(lora_b), lora_a.shape[1])
            if name not in state or (len(state[name]), math.prod(state[name].shape[1:])) != needed:
                there = f"has {tuple(state[name].shape)}" if name in state else "has no such layer"
                raise FibldmError(
                    f"an adapter must be put on the network that it was trained on; {self.file} moves {name}, a matrix "
                    f"of {needed[0]} x {needed[1]}, and this network {there}",
                    _OWN,
                )
        if (base := self.facts["base"]) not in (found := _fingerprints(state)):
            raise FibldmError(
                f"an adapter must be put on the weights that it was trained on; {self.file} was trained on "
                f"{base[:12]}, and these are {found[-1][:12]}",
                f"{_OWN}; weights in half precision are others than those they were made of",
            )
        if other := differing(self.facts["frame"], frame):
            raise FibldmError(
                f"an adapter must work in the frame that it was trained in; {self.file} was trained with "
                f"{told_of(self.facts['frame'], other)}, and this generator has {told_of(frame, other)}",
                _OWN,
            )


def write_adapter(
    file: Path, updates: Mapping[str, Tensor], facts: Mapping[str, Any], *, tokens: Mapping[str, Tensor] | None = None
) -> None:
    """Keep updates as `fibldm.models.low_rank.updates_of` gives them; the same ones give the same bytes."""
    vectors = {f"{_TOKEN}{name}": vector.detach().cpu().clone() for name, vector in (tokens or {}).items()}
    # one text, as safetensors shuffles entries of metadata
    write_tensors(
        file, {**updates, **vectors}, {_KEY: json.dumps({"format": FORMAT, **facts}, sort_keys=True, allow_nan=False)}
    )


def put_on(
    state: Mapping[str, Tensor], adapters: Sequence[tuple[Adapter, float]], frame: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A state with updates added, each times its strength: ``W + sum_i strength_i alpha_i / rank_i B_i A_i``.

    0 leaves the weights alone to the bit, 1 gives those that training ended with. The order does not matter.

    Args:
        state: of the network that all were trained on, on the CPU.
        adapters: with their strengths.
        frame: of the generator.

    Raises:
        FibldmError: a strength is no number of at least 0, an adapter comes twice, or one does not fit.
    """
    check_strengths({adapter.file: strength for adapter, strength in adapters})
    if len({adapter.sha256 for adapter, _ in adapters}) < len(adapters):
        raise FibldmError("every adapter must be given once; one came twice", "add the strengths up")
    for adapter, _ in adapters:
        adapter.check(state, frame)
    made = dict(state)
    for adapter, strength in sorted(adapters, key=lambda pair: pair[0].sha256):
        for name, (lora_a, lora_b) in adapter.updates.items() if strength else ():
            made[name] = moved(made[name], lora_a, lora_b, strength * adapter.scale)
    return made


def check_strengths(strengths: Mapping[Any, Any]) -> None:
    """Refuse what is no strength.

    Raises:
        FibldmError: one is no finite number of at least 0.
    """
    for file, strength in strengths.items():
        number = isinstance(strength, int | float) and not isinstance(strength, bool)
        if not number or not 0 <= strength < math.inf:
            raise FibldmError(
                f"the strength of an adapter must be a number of at least 0; {file} has {strength!r}",
                "1 is as trained, 0 switches it off",
            )


def frame_of(
    space: LatentSpace,
    process: Process,
    target: Target,
    conditions: Mapping[str, Condition | None],
    *,
    intensity: Mapping[str, Any],
    spacing: Sequence[float],
) -> dict[str, Any]:
    """What gives the numbers that a network sees their meaning, as plain values: the same for generator and adapter.

    Args:
        space: of the latents.
        process: of diffusion.
        target: of the network's output.
        conditions: that it is shown, by name.
        intensity: as `fibldm.volumes.intensity.Intensity.to_dict` tells it; the range of outputs is left out.
        spacing: of the model grid, mm.
    """
    frame = {
        "latent space": space.to_dict(),
        "process": _plain(process),
        "target": target,
        **{f"condition {name}": _plain(part) for name, part in sorted(present(conditions).items())},
        "intensity": {key: value for key, value in intensity.items() if not key.startswith("output_")},
        "spacing": list(spacing),
    }
    plain: dict[str, Any] = json.loads(json.dumps(frame, default=str))
    return plain


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Parts of a frame that are otherwise in another one, which may show more conditions."""
    return [name for name, value in one.items() if other.get(name) != value]


def told_of(frame: Mapping[str, Any], names: Sequence[str]) -> str:
    """Parts of a frame in words, which may be long."""
    return ", ".join(f"{name} {str(frame.get(name, 'none'))[:_SHOWN]}" for name in names)


def _plain(part: Any) -> dict[str, Any]:
    """The kind of a dataclass and its values, without what it was given later, such as an open encoder."""
    given = {field.name for field in fields(part) if field.init}
    values = asdict(replace(part))
    return {"kind": type(part).__name__, **{name: value for name, value in values.items() if name in given}}


def _fingerprints(state: Mapping[str, Tensor]) -> list[str]:
    """Of a network without its ControlNets, with the first of them, and so on up to all of it."""
    count = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("controls.")), default=-1)
    later = [tuple(f"controls.{place}." for place in range(first, count)) for first in range(count + 1)]
    return [
        hash_weights({name: weight for name, weight in state.items() if not name.startswith(names)}) for names in later
    ]


def _paired(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in sorted({name.removesuffix(_PARTS[0]).removesuffix(_PARTS[1]) for name in tensors}):
        factors = [tensors.get(layer + part) for part in _PARTS]
        lora_a, lora_b = factors
        if lora_a is None or lora_b is None or {lora_a.ndim, lora_b.ndim} != {2} or len(lora_a) != lora_b.shape[1]:
            raise FibldmError(
                f"{file} must hold lora_a (r, in) and lora_b (out, r) of every layer; {layer} has not", _ASK
            )
        if not all(bool(factor.isfinite().all()) for factor in (lora_a, lora_b)):
            raise FibldmError(f"updates must be finite; those of {layer} in {file} are not", _ASK)
        pairs[f"{layer}.weight"] = (lora_a.float(), lora_b.float())
    return pairs


def _is_token(name: str) -> bool:
    return name.startswith(_TOKEN) and not name.endswith(_PARTS)
