"""A stage that has nothing to learn."""

import logging
from typing import Any

import torch
from monai.bundle import ConfigParser

from fibldm.files import atomic_path
from fibldm.runs import hash_weights
from fibldm.training.distributed import is_first_rank
from fibldm.training.initialise import initialise
from fibldm.training.stage import Stage

_logger = logging.getLogger("fibldm")


class UntrainedStage(Stage):
    """A stage whose network is finished as it is built; later stages read it like any other.

    It reads ``network_def``, ``init_from`` and ``init_strict`` of the configuration and nothing else.
    """

    least_epochs = 0

    def _train(self, parser: ConfigParser) -> None:
        if not is_first_rank():
            return
        get = parser.get_parsed_content
        network: Any = get("network_def")
        if get("init_from"):
            initialise(network, get("init_from"), strict=bool(get("init_strict")), stage=self.folder.name)
        best = {"model": network.state_dict(), "epoch": 0, "loss": 0.0}
        with atomic_path(self.folder.checkpoints / "best.pt") as temporary:
            torch.save(best, temporary)
        self.folder.finish(
            epochs=0, stopped_epoch=0, best_epoch=0, validation_loss=0.0, weights=hash_weights(best["model"])
        )
        _logger.info("%s: %s has nothing to learn, done", self.folder.name, type(network).__name__)
