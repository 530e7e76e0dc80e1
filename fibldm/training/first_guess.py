"""Where stage 1 begins: the best linear autoencoder of the training volumes, in closed form."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from fibldm.models.autoencoder import Autoencoder
from fibldm.training.draws import Draw, KeyedDataset, key_seed

_logger = logging.getLogger("fibldm")


class FirstGuess:
    """Fit the principal components of an autoencoder to patches of the training cases.

    Args:
        dataset: gives items with ``image`` ``(C, X, Y, Z)`` and ``valid`` ``(1, X, Y, Z)``.
        seed: of the run; the patches are others than those of the first epoch.
        patches: that are looked at, spread over the cases.
    """

    def __init__(self, dataset: KeyedDataset, *, seed: int, patches: int = 256) -> None:
        self.dataset, self.seed, self.patches = dataset, seed, patches

    def __call__(self, network: Autoencoder) -> None:
        """Fit a network that has principal components.

        Raises:
            FibldmError: it has none, or too little of the volumes counts.
        """
        network.fit(self._volumes(next(network.parameters()).device))
        _logger.info("autoencoder: begins with the principal components of %d patches", self.patches)

    def _volumes(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self.patches):
            view, index = divmod(number, len(self.dataset))
            item = self.dataset[Draw(index, view, key_seed(self.seed, 0, index, view))]
            yield item["image"][None].float().to(device), item["valid"][None].to(device)
