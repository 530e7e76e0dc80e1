"""Options of several numbers, such as ``--spacing``: ``1,1,2.5`` and ``1 1 2.5`` are the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from fibldm.errors import FibldmError


class NumbersCommand(TyperCommand):
    """A command all of whose options of several numbers take them in both ways."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        counts = {name: option.nargs for option in self.params for name in option.opts if option.nargs > 1}
        return super().parse_args(ctx, spread(args, counts))


def split_numbers(text: str) -> list[str]:
    """The parts of ``1,1,2.5``, ``1 1 2.5`` or ``[1, 1, 2.5]``."""
    return text.strip("[]() ").replace(",", " ").split()


def spread(arguments: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """Arguments in which the numbers of such options stand one by one.

    Args:
        arguments: of a command line.
        counts: how many numbers an option takes, by its name.

    Raises:
        FibldmError: an option has another count of numbers.
    """
    spread_out, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        option, sign, given = argument.partition("=")
        if option not in counts or not (given or rest):
            spread_out.append(argument)
            continue
        given = given if sign else rest.pop(0)
        while given.rstrip().endswith(",") and rest:
            given += rest.pop(0)
        numbers = split_numbers(given)
        if len(numbers) != counts[option] and (len(numbers) != 1 or "," in given):
            example = [f"{number}" for number in range(1, counts[option] + 1)]
            raise FibldmError(
                f"{option} needs {counts[option]} numbers, such as {','.join(example)} or {' '.join(example)}; "
                f"got {given!r}"
            )
        spread_out += [option, *numbers]  # of a single one, the others follow
    return spread_out
