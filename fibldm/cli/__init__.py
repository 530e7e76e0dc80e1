"""The command line: one thin file per command, and here what they share: global options, errors, exit codes.

A command is the function of a module's own name, ``fibldm.cli.doctor.doctor``; a command ``import-weights`` is
``fibldm.cli.import_weights.import_weights``. It imports what it needs inside its body, so that ``--help`` stays fast,
prints for people with ``print``, and returns what ``--json`` shows, or ``None``.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated

import typer

from fibldm import __version__
from fibldm.cli.numbers import NumbersCommand
from fibldm.cli.output import emit_error, emit_result, standard_output_for_json, with_options
from fibldm.errors import FibldmError
from fibldm.out_of_memory import out_of_memory

# In the order of the help text; a new command is one more name.
COMMANDS = (
    "doctor",
    "prepare",
    "slices",
    "plan",
    "train",
    "encode",
    "synthesize",
    "synthesize-masks",
    "edit",
    "edit-masks",
    "watch",
    "node",
    "studio",
    "picture",
    "evaluate",
    "audit",
    "stress",
    "report",
    "recognise",
    "export",
    "verify",
    "pipeline",
    "import-weights",
    "fetch",
    "demo",
    "phantoms",
)

EPILOG = "--json and --debug work with every command."

app = typer.Typer(
    name="fibldm",
    help="3-D latent diffusion: synthetic CT and MRI that follow your masks.",
    epilog=EPILOG,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fibldm {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    json: Annotated[bool, typer.Option("--json", help="Last line of standard output: one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """``run`` takes --json and --debug out of the arguments itself, so that they may stand after the command too."""


def _register(name: str) -> None:
    identifier = name.replace("-", "_")
    command = getattr(import_module(f"fibldm.cli.{identifier}"), identifier)
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name, epilog=EPILOG)
    else:
        app.command(name, cls=NumbersCommand, epilog=EPILOG)(command)


for _name in COMMANDS:
    _register(_name)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    rest = [argument for argument in arguments if argument not in ("--json", "--debug")] or ["--help"]
    try:
        with standard_output_for_json(as_json):
            result = app(rest, prog_name="fibldm", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        return _report(error, as_json, _options(rest))
    if isinstance(result, int):  # a command that left through typer.Exit
        return _report(KeyboardInterrupt(), as_json, {}) if result == 130 else result
    return emit_result(result, as_json)


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """The options of the command that was given, by their names and by those that the library has for them."""
    command = typer.main.get_command(app)
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument, command)
    named = [(parameter.name, option) for parameter in command.params for option in parameter.opts]
    options = [(name, option) for name, option in named if option.startswith("--")]
    return {**dict(options), **{option.removeprefix("--").replace("-", "_"): option for _, option in options}}


def _report(error: BaseException, as_json: bool, options: Mapping[str, str]) -> int:
    match error:
        case FibldmError():
            message, remedy = (with_options(text, options) for text in (error.message, error.remedy))
            emit_error(message, remedy, as_json)
            return 2
        case typer.TyperException():
            emit_error(_usage_message(error), "see fibldm --help, or --help after the command", as_json)
            return 2
        case KeyboardInterrupt() | typer.Abort():
            emit_error("interrupted", "run the same command again to go on", as_json)
            return 130
    if (told := out_of_memory(error)) is not None:
        emit_error(told.message, told.remedy, as_json)
        return 2
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    emit_error(f"unexpected error: {reason}", "run again with --debug to see the traceback", as_json)
    return 1


def _usage_message(error: typer.TyperException) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return message.rstrip(".")


def main() -> None:
    """The console script ``fibldm``; lines of a log are there when they are said, not when a command ends."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    sys.exit(run(sys.argv[1:]))
