"""From names and overrides to a checked configuration, and the plain MONAI command that runs the same."""

import logging
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from fibldm.errors import FibldmError, unknown_choice
from fibldm.runs.causes import unwrapped
from fibldm.runs.config_files import ConfigFiles, find, read, shipped, shown
from fibldm.runs.config_keys import check_keys
from fibldm.runs.locator import parser_of
from fibldm.runs.options import in_order
from fibldm.runs.stages import TABLE, files_of_stages
from fibldm.runs.workflow import StageWorkflow
from fibldm.verbatim import as_argument, verbatim


class IncompatibleGrid(FibldmError):
    """The model grid does for stage 1, and not for stage 2."""


@dataclass(frozen=True)
class Configuration:
    """The files of a stage, in the order they are merged, and the overrides on top.

    Attributes:
        files: YAML files; later ones change earlier ones.
        overrides: ``key::sub`` to value.
    """

    files: tuple[Path, ...]
    overrides: Mapping[str, Any]

    @property
    def command(self) -> str:
        """The same through MONAI alone."""
        return self.command_of(1)

    def command_of(self, devices: int) -> str:
        """The same through MONAI alone, by so many processes."""
        python = "python" if devices == 1 else f"torchrun --standalone --nproc-per-node {devices}"
        listed = "[" + ",".join(repr(str(shown(file))) for file in self.files) + "]"
        quoted = shlex.quote(listed) if re.search(r'[\\"$`!]', listed) else f'"{listed}"'
        arguments = " ".join(f"--{key} {shlex.quote(as_argument(value))}" for key, value in self.overrides.items())
        return f"{python} -m monai.bundle run --config_file {quoted} {arguments}".rstrip()

    def parser(self) -> ConfigParser:
        """Files and overrides as one; of a part nothing is made until it is asked for."""
        parser = parser_of(ConfigFiles.load_config_files([str(file) for file in self.files]))
        for key, value in self.overrides.items():
            parser[key] = value
        return parser

    def run(self, *, began: float | None = None) -> None:
        """Run the configuration in this process.

        Args:
            began: when that began, in seconds of `time.monotonic`, for ``minutes`` to count from; None is now.

        Raises:
            FibldmError: what a part of it refused, without MONAI's wrapping.
        """
        began = time.monotonic() if began is None else began
        parser = self.parser()
        timed = parser.get("minutes") is not None and "epochs" in parser  # latents have none
        overrides = {**self.overrides, "stage::began": began} if timed else self.overrides
        with _without_warnings_of_files():
            workflow = StageWorkflow(
                config_file=[str(file) for file in self.files],
                logging_file=False,
                workflow_type="train",
                **overrides,
            )
        with unwrapped():
            workflow.initialize()
            workflow.run()
            workflow.finalize()


def stage_configuration(
    stage: str, *, work: Path, run_dir: Path, configs: Sequence[str], overrides: Mapping[str, Any]
) -> Configuration:
    """The configuration of a training stage: common, the stage's files, and the user's own.

    Args:
        stage: one of the table of stages.
        work: folder of ``fibldm prepare``.
        run_dir: the run folder.
        configs: paths, or names of shipped configurations, of the data and of changes; they come last.
        overrides: ``key::sub`` to value, in any order.

    Raises:
        FibldmError: a file is missing or no YAML mapping, no data configuration is given, a key is unknown or
            replaces what was said before of a part of it, a number of something is none, or the overrides give epochs
            and something gives minutes.
    """
    if stage not in TABLE:
        raise unknown_choice("stage", stage, TABLE)
    base = [shipped(name) for name in ("common", *TABLE[stage].files)]
    given = [find(name) for name in configs]
    known = {key for name in ("common", *files_of_stages()) for key in read(shipped(name))}
    folders = {"work": verbatim(str(work)), "run_dir": verbatim(str(run_dir))}
    configuration = Configuration((*base, *given), in_order({**folders, **overrides}))
    check_keys(configuration, given, known)
    return configuration


def check_grid(autoencoder: Configuration, diffusion: Configuration | None = None) -> None:
    """Refuse a model grid that would be refused only after stage 1 was trained.

    Args:
        autoencoder: stage 1, on a prepared work folder.
        diffusion: stage 2; None takes the UNet as it ships.

    Raises:
        IncompatibleGrid: an axis is not divisible by the autoencoder's compression times what the UNet halves.
        FibldmError: the autoencoder is refused.
    """
    first = autoencoder.parser()
    ships = tuple(shipped(name) for name in ("common", *TABLE["diffusion"].files))
    second = (diffusion or Configuration(ships, {})).parser()
    channels = next((key for key in ("unet::channels", "unet::num_channels") if key in second), None)
    if channels is None:
        return  # another kind of network, which may divide otherwise
    with unwrapped():
        compression = first.get_parsed_content("network_def").compression
    size = tuple(first.get_parsed_content("size"))
    halvings = len(second.get_parsed_content(channels)) - 1
    steps = [step * 2**halvings if length > 1 else 1 for length, step in zip(size, compression, strict=True)]
    if any(length % step for length, step in zip(size, steps, strict=True)):
        fitting = tuple(-(-length // step) * step for length, step in zip(size, steps, strict=True))
        raise IncompatibleGrid(
            f"for stage 2, size {size} of the model grid must be divisible by {tuple(steps)}, "
            f"which is the autoencoder's compression times 2^{halvings} of the UNet",
            f"choose size {fitting}, or fewer unet_channels",
        )


@contextmanager
def _without_warnings_of_files() -> Iterator[None]:
    """MONAI warns that there is no file for logging, and that files lie in several folders; both are meant so."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("Logging file is set to False", "Not all config files are in"))

    logger = logging.getLogger("monai.bundle.workflows")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
