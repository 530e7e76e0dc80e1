"""The cached latents of a run, as the stages read them that train on them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.transforms import Transform
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fibldm.errors import FibldmError
from fibldm.files import hash_file
from fibldm.models.autoencoder import Posterior
from fibldm.models.conditions.condition import Case, Condition, present
from fibldm.models.conditions.covariates import CovariateEncoding
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.latents import LatentSpace
from fibldm.runs import load_facts
from fibldm.training.base_latents import covariates_as_fitted
from fibldm.training.encode_stage import EncodeStage as EncodeStage  # configurations of before name it here
from fibldm.training.view_cache import SPLITS
from fibldm.volumes.datalist import SECOND_IMAGE

_OF_LATENT = {"mean", "std", "valid", "seed", "view"}


@dataclass(frozen=True)
class Latents:
    """The cached latents of a run.

    Attributes:
        run_dir: the run folder.
        facts: content of ``latents.json``.
    """

    run_dir: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, run_dir: str | Path) -> "Latents":
        """Open the latents of a run.

        Raises:
            FibldmError: they are not finished, another autoencoder made them, or files of them are gone.
        """
        latents = cls(Path(run_dir), load_facts(run_dir))
        files = [Path(item["file"]) for split in SPLITS for item in latents.items(split)]
        if gone := [file for file in files if not file.exists()]:
            raise FibldmError(
                f"{len(gone)} of {len(files)} cached latents are gone, the first is {gone[0]}",
                "run `fibldm encode`, which makes those that are missing",
            )
        return latents

    @property
    def channels(self) -> int:
        return len(self.facts["space"]["mean"])

    @property
    def space(self) -> LatentSpace:
        return LatentSpace.from_dict(self.facts["space"])

    def mask(self, detail: int, **choices: Any) -> MaskEncoding:
        """How the masks of these latents are encoded, see `MaskEncoding`; ``choices`` are of its attributes."""
        compression = self.facts["compression"]
        voxels = compression if isinstance(compression, int) else tuple(compression)
        labels = tuple(int(label) for label in self.facts["labels"])
        spacing = tuple(self.facts["grid"]["spacing"])
        return MaskEncoding(labels, voxels, detail, spacing=spacing, **choices)

    def covariates(self, names: Sequence[str], categories: Sequence[str] = ()) -> CovariateEncoding | None:
        """How covariates are encoded, by those of the training cases or of the base; None where there are no names.

        A name that comes twice is one covariate.

        Raises:
            FibldmError: the training cases do not have or do not differ in one of them; see `CovariateEncoding.fit`.
        """
        names = list(dict.fromkeys(names))
        if not names:
            return None
        if fitted := self.facts.get("fitted"):
            return covariates_as_fitted(fitted, names)
        return CovariateEncoding.fit(names, self.training_cases, categories)

    @property
    def training_cases(self) -> list[dict[str, Any]]:
        """What is known of each training case, for conditions that are fitted to it."""
        return list(self.known_cases("training").values())

    def known_cases(self, split: str) -> dict[str, dict[str, Any]]:
        """What is known of each case of "training" or "validation", by its name."""
        return {item["case"]: self.known_of(item["case"]) for item in self.facts["items"][split]}

    def training_labels(self) -> Iterator[Tensor]:
        """The mask of each training case on the model grid, not augmented, ``(1, X, Y, Z)``."""
        plain = {item["case"]: item for item in reversed(self.items("training"))}  # its first view
        for item in reversed(plain.values()):
            with safe_open(item["file"], framework="pt") as content:
                yield content.get_tensor("labels")

    def known_of(self, case: str) -> dict[str, Any]:
        """The covariates of a case, by name; None where one is unknown."""
        known: dict[str, Any] = self.facts.get("covariates", {}).get(case, {})
        return known

    def case(self, name: str, tensors: Mapping[str, Tensor]) -> Case:
        """What conditions are made of, of a case by its name and the tensors of a view."""
        images = {SECOND_IMAGE: tensors[SECOND_IMAGE].float()} if SECOND_IMAGE in tensors else {}
        return Case(tensors["labels"], self.known_of(name), images, name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ``latents.json``, which names the autoencoder, the data and every file."""
        return hash_file(self.run_dir / "latents" / "latents.json")

    def items(self, split: str) -> list[dict[str, str]]:
        """One item per cached view: ``file``, ``case``, ``subject``."""
        folder = self.run_dir / "latents"
        return [{**item, "file": str(folder / item["file"])} for item in self.facts["items"][split]]


class LoadLatent(Transform):
    """Read a cached latent: its normalised posterior, which cells are valid, and the conditions of its case.

    Args:
        latents: the run's latents.
        conditions: how each is encoded, by name; None of one leaves it out.

    Raises:
        FibldmError: a condition has the name of something else.
    """

    def __init__(self, latents: Latents, conditions: Mapping[str, Condition | None]) -> None:
        self.latents, self.space = latents, latents.space
        self.conditions: dict[str, Condition] = present(conditions)
        if taken := self.conditions.keys() & _OF_LATENT:
            raise FibldmError(f"conditions must not be named {', '.join(sorted(taken))}", "choose another name")

    def __call__(self, item: Mapping[str, str]) -> dict[str, Tensor]:
        """``mean`` and ``std`` ``(C, x, y, z)``, ``valid`` ``(1, x, y, z)``, and every condition, encoded, by its name.

        All float32 but mask and image, which are float16: they are the largest, and all cases are kept in memory.

        Raises:
            FibldmError: another autoencoder made this latent, or its file is gone or damaged.
        """
        try:
            with safe_open(item["file"], framework="pt") as content:
                self.space.check_autoencoder(content.metadata()["autoencoder"], item["file"])
                tensors = {name: content.get_tensor(name) for name in content.keys()}
        except (OSError, SafetensorError) as error:
            raise FibldmError(
                f"{item['file']} must be a cached latent; {error}", "run `fibldm encode`, which makes it again"
            ) from error
        posterior = Posterior(tensors["mean"][None], tensors["std"][None])
        mean, std = self.space.normalise_posterior(posterior)
        case = self.latents.case(item["case"], tensors)
        shown = {name: part.encode_case(case).to(part.kept_as) for name, part in self.conditions.items()}
        return {"mean": mean[0], "std": std[0], "valid": tensors["valid"], **shown}
