"""Adapters on a generator, and whether a training makes one that its base can take."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fibldm.errors import FibldmError
from fibldm.files import hash_value
from fibldm.models.adapters import OTHER_BASE, Adapter, differing, frame_of, put_on, told_of
from fibldm.models.conditions.condition import Condition, present
from fibldm.models.conditions.token import TOKEN, TokenNames
from fibldm.models.latents import LatentSpace
from fibldm.models.process import Process, Target
from fibldm.models.tokens import VECTORS, tokens_of, with_tokens
from fibldm.runs import StageFolder, hash_weights, load_facts
from fibldm.synthesis.bundle import GENERATOR, open_bundle

if TYPE_CHECKING:
    from fibldm.synthesis.synthesizer import Synthesizer

_logger = logging.getLogger("fibldm")


def with_adapters(generator: "Synthesizer", adapters: Mapping[str | Path, float]) -> dict[str, Any]:
    """What changes of a generator: ``network``, another one then, ``conditions``, ``source``, ``choice`` and ``data``.

    Raises:
        FibldmError: see `fibldm.models.adapters.put_on` and `fibldm.models.tokens.tokens_of`.
    """
    read = sorted(
        ((Adapter.read(file), strength) for file, strength in adapters.items()), key=lambda pair: pair[0].sha256
    )
    state = {name: weight.detach().cpu() for name, weight in generator.network.state_dict().items()}
    made = put_on(state, read, generator.frame)
    network, before = deepcopy(generator.network), str(generator.source["weights"])
    network.load_state_dict(made)
    conditions = dict(generator.conditions)
    if tokens := tokens_of(read):
        network, conditions[TOKEN] = with_tokens(network, tokens), TokenNames(tuple(tokens))
    if any(strength and adapter.tokens for adapter, strength in read):  # at strength 0 it is the base
        made[VECTORS] = network.state_dict()[VECTORS].cpu()
    used = [_told(adapter, strength) for adapter, strength in read]
    if hash_weights(state) == before:
        weights = hash_weights(made)
    else:  # several ControlNets with strengths, which the tensors do not tell
        counting = [one for one in used if one["strength"]]
        weights = hash_value([before, counting]) if counting else before
    for adapter, strength in read:
        said = "adapter %s of %d cases, at strength %g%s"
        asked = "".join(f"; it is drawn where it is asked for by token={name}" for name in adapter.tokens)
        _logger.info(said, adapter.sha256[:12], adapter.facts["data"].get("cases", 0), strength, asked)
    return {
        "network": network,
        "conditions": conditions,
        "source": {**generator.source, "weights": weights},
        "choice": {**generator.choice, "adapters": [*generator.choice.get("adapters", ()), *used]},
        "data": None if any(strength for _, strength in read) else generator.data,
    }


def _told(adapter: Adapter, strength: float) -> dict[str, Any]:
    known = {"tokens": list(adapter.tokens)} if adapter.tokens else {}
    return {"sha256": adapter.sha256, "strength": float(strength), **known}


class BaseCheck:
    """Refuses, before hours of training, an adapter that the generator of ``init_from`` could not take.

    Of a file of weights alone nothing is known, and nothing is refused.

    Args:
        base: value of ``init_from``.
        stage: that is trained.
        latents: of the run that is trained, with ``space`` and ``facts``.
        process: of diffusion.
        target: of the network.
        conditions: that training shows.
        trust: see `open_bundle`.
    """

    def __init__(
        self,
        base: str | None,
        stage: str,
        *,
        latents: Any,
        process: Process,
        target: Target,
        conditions: Mapping[str, Condition | None],
        trust: bool = False,
    ) -> None:
        self.base, self.stage, self.trust = base, stage, trust
        facts = latents.facts
        given = {"intensity": facts["intensity"], "spacing": facts["grid"]["spacing"]}
        own = {name: part for name, part in conditions.items() if name != TOKEN}  # which the base will not have
        self.frame = frame_of(latents.space, process, target, own, **given)

    def __call__(self) -> None:
        """Compare.

        Raises:
            FibldmError: the base works in another frame, knows tokens already, or is refused.
        """
        theirs = None if self.base is None else _frame_behind(Path(self.base), self.stage, self.trust)
        if theirs is not None and f"condition {TOKEN}" in theirs:
            raise FibldmError(f"an adapter is learned on a base without tokens; {self.base} has some", OTHER_BASE)
        if theirs is not None and (other := differing(self.frame, theirs)):
            raise FibldmError(
                f"an adapter must work in the frame of its base; {self.base} has {told_of(theirs, other)}, and this "
                f"run {told_of(self.frame, other)}",
                "take the autoencoder from there (autoencoder_as_given with init_from), then `fibldm encode --set "
                f"latent_space={self.base}`, and all else as it was trained",
            )


def _frame_behind(source: Path, stage: str, trust: bool) -> dict[str, Any] | None:
    """Of the run or the bundle that a source of weights is, or lies in."""
    for root in (source, *list(source.parents)[:3]):
        if (root / GENERATOR).is_file():
            with open_bundle(root, trust=trust) as bundle:
                return _frame(bundle.facts, bundle.made("process"), bundle.facts["target"], bundle.made("conditions"))
        folder = StageFolder(root, stage)
        if (root / "latents").is_dir() and folder.done() is not None:
            process, target = folder.component("process"), folder.component("target")
            conditions = {**present(folder.component("conditions")), "mask": folder.component("mask")}
            return _frame(load_facts(root), process, target, conditions)
    return None


def _frame(
    facts: Mapping[str, Any], process: Process, target: Target, conditions: Mapping[str, Condition | None]
) -> dict[str, Any]:
    space, known = LatentSpace.from_dict(facts["space"]), {"intensity": facts["intensity"]}
    return frame_of(space, process, target, conditions, **known, spacing=facts["grid"]["spacing"])
