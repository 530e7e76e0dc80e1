"""Facts of the scans that a user asks for: which there are, and how many cases state them."""

from collections.abc import Mapping, Sequence

from fibldm.errors import FibldmError
from fibldm.volumes.scan import ACQUISITION, Covariate

SPACING = "spacing"
FACTS = (SPACING, *ACQUISITION)
IF_ASKED = frozenset({"body_part"})
"""Of `ACQUISITION`, what is carried along only where it is asked for; the others are wherever files state them."""


def notes_on_facts(asked: Sequence[str], known: Mapping[str, Mapping[str, Covariate]]) -> list[str]:
    """What is to be said of facts that not all cases state.

    Args:
        asked: of `FACTS`; the spacing is known of all.
        known: what is known of each case, by its name; a fact of a channel has its name with the channel's behind it.

    Raises:
        FibldmError: no case states one of them; names all.
    """
    counts = {name: sum(_states(name, of_case) for of_case in known.values()) for name in asked if name != SPACING}
    if none := [name for name, count in counts.items() if known and not count]:
        raise FibldmError(
            f"`facts` must be stated by the files of some case; none of {len(known)} states {', '.join(none)}",
            "leave it out, or add it as a column of a table",
        )
    partly = {name: count for name, count in counts.items() if count < len(known)}
    return [
        f"{name} is stated by {count} of {len(known)} cases, of the others unknown" for name, count in partly.items()
    ]


def _states(name: str, known: Mapping[str, Covariate]) -> bool:
    return any(key == name or key.startswith(f"{name}_") for key, value in known.items() if value is not None)
