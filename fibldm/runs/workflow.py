"""MONAI's workflow of a stage, and the parser that a stage runs by."""

import inspect
from contextvars import ContextVar
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from fibldm.runs.locator import Locator

_RUNNING: ContextVar[ConfigParser | None] = ContextVar("_RUNNING", default=None)


class StageWorkflow(ConfigWorkflow):
    """A configuration of a stage that is run, and whose stage can ask for all of it; see `running_parser`.

    ``python -m monai.bundle run_workflow --workflow_name fibldm.runs.workflow.StageWorkflow --config_file ...``
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parser.locator = Locator()

    def run(self) -> Any:
        """Run it, as MONAI does."""
        token = _RUNNING.set(self.parser)
        try:
            return super().run()
        finally:
            _RUNNING.reset(token)


def running_parser(stage: object) -> ConfigParser:
    """The parser of the configuration that a stage stands in as ``stage``, while that is run.

    A run folder must record the whole configuration, overrides included, and MONAI hands an expression only the objects
    that it names. `StageWorkflow` knows it; under MONAI's own workflow, as by ``python -m monai.bundle run``, it is
    taken from the call stack.

    Raises:
        RuntimeError: no configuration is run.
    """
    parser = _RUNNING.get()
    # not of another stage, from within which this one is run
    if parser is not None and "stage" in parser and parser.get_parsed_content("stage") is stage:
        return parser
    return _evaluating_parser()


def _evaluating_parser() -> ConfigParser:
    """The parser whose expression is being evaluated."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            return owner
        frame = frame.f_back
    raise RuntimeError("a stage must be run from an expression of a MONAI configuration, such as $@stage.run()")
