"""Prior preservation: few scans are learned by a token while what the base network knew is shown beside them.

Ruiz et al. 2023, "DreamBooth: fine tuning text-to-image diffusion models for subject-driven generation", equation 2:
the loss of the few images, asked for by the token, plus ``lambda`` times that of samples of the base, without it. Here
those are the base's own training cases where they are at hand; volumes that the base drew serve as well.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from fibldm.errors import FibldmError
from fibldm.models.conditions.condition import Condition, present
from fibldm.models.conditions.token import TOKEN
from fibldm.training.draws import Draw, KeyedDataset, key_seed
from fibldm.training.latents import Latents, LoadLatent
from fibldm.training.prepare_batch import SAMPLE_WEIGHT

_ALIKE = ("space", "grid", "intensity")
_SET = "set prior to the run of the base, or to a run of volumes that it drew, encoded with the base as latent_space"


class WithPrior(Dataset[list[dict[str, Any]]]):
    """Few scans, each draw with one of the base's cases, in which nothing is asked of the token.

    MONAI's collating makes one batch of both. Which case comes beside a draw, and what is random about it, follows from
    the draw's own seed.

    Args:
        dataset: of the few scans.
        prior: of the base's cases, with the same conditions.
        token: how the token is encoded.
        weight: lambda, of the base's cases in the loss.
    """

    def __init__(self, dataset: KeyedDataset, prior: KeyedDataset, token: Condition, weight: float) -> None:
        self.dataset, self.prior, self.token, self.weight = dataset, prior, token, weight

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> list[dict[str, Any]]:
        beside = Draw(key_seed(draw.seed, 0) % len(self.prior), draw.view, key_seed(draw.seed, 1))
        shown, known = self.dataset[draw], self.prior[beside]
        without = {**known, TOKEN: self.token.null(known[TOKEN][None])[0]}
        return [{**shown, SAMPLE_WEIGHT: torch.tensor(1.0)}, {**without, SAMPLE_WEIGHT: torch.tensor(self.weight)}]


def prior_of(
    run: str | None, *, latents: Latents, conditions: Mapping[str, Condition | None], weight: float, rank: int
) -> Latents | None:
    """The latents that are shown beside those of few scans.

    Args:
        run: with latents of the base's cases.
        latents: of the few scans.
        conditions: that training shows.
        weight: of the prior; 0 is none.
        rank: of the updates beside the token; without any, nothing that is trained changes what the base draws without
            the token, and there is nothing to preserve.

    Returns:
        None where none are shown.

    Raises:
        FibldmError: the weight is no number of at least 0, there are no such latents, or they differ from those of the
            few scans in more than their cases.
    """
    if not is_shown(weight, rank):
        return None
    if run is None or not (Path(run) / "latents" / "latents.json").is_file():
        raise FibldmError(f"a prior must be a run whose latents are made; {run} is none", _SET)
    prior = Latents.open(run)
    alike = (*_ALIKE, *(["labels"] if "mask" in present(conditions) else []))
    if differing := [key for key in alike if prior.facts.get(key) != latents.facts.get(key)]:
        told = "; ".join(f"{key} {prior.facts.get(key)} and {latents.facts.get(key)}" for key in differing)
        raise FibldmError(f"latents of the prior must be made as those of the few scans; {run} differs: {told}", _SET)
    return prior


def with_prior(
    dataset: KeyedDataset, prior: Latents | None, conditions: Mapping[str, Condition | None], *, weight: float
) -> KeyedDataset | WithPrior:
    """A dataset of few scans with the prior beside them; as it is where there is none."""
    if prior is None:
        return dataset
    known = present(conditions)
    cases = KeyedDataset(data=prior.items("training"), transform=LoadLatent(prior, known), progress=False)
    return WithPrior(dataset, cases, known[TOKEN], float(weight))


def is_shown(weight: float, rank: int) -> bool:
    """Whether there is a prior, see `prior_of`.

    Raises:
        FibldmError: the weight is no number of at least 0.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise FibldmError(f"prior_weight must be a number of at least 0; got {weight!r}", "1 is usual, 0 is none")
    return bool(weight and rank)


def draws_of_batch(batch_size: int, *, weight: float, rank: int) -> int:
    """How many draws of few scans make a batch, of which half is the prior where there is one, see `prior_of`.

    Raises:
        FibldmError: it cannot be halved, or the weight is no number of at least 0.
    """
    if not is_shown(weight, rank):
        return batch_size
    if batch_size % 2:
        raise FibldmError(
            f"half of a batch is the prior, so that it must be even; got {batch_size}",
            "change batch_size, which is that of all ranks together",
        )
    return batch_size // 2
