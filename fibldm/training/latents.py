"""Cached latents: written once by the encode stage, read by the stages that train on them."""

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Transform
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fibldm.files import atomic_path, hash_file, write_json
from fibldm.models.autoencoder import FrozenFirstStage, Posterior
from fibldm.models.conditioning import MaskEncoding
from fibldm.models.latents import LatentSpace
from fibldm.runs import StageFolder, load_facts
from fibldm.training.draws import key_seed
from fibldm.training.stage import running_parser

_logger = logging.getLogger("fibldm")


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
            FibldmError: they are not finished, or another autoencoder made them.
        """
        return cls(Path(run_dir), load_facts(run_dir))

    @property
    def channels(self) -> int:
        return len(self.facts["space"]["mean"])

    @property
    def space(self) -> LatentSpace:
        return LatentSpace.from_dict(self.facts["space"])

    def mask(self, detail: int) -> MaskEncoding:
        """How the masks of these latents are encoded, see `MaskEncoding`."""
        return MaskEncoding(tuple(int(label) for label in self.facts["labels"]), self.facts["compression"], detail)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ``latents.json``, which names the autoencoder, the data and every file."""
        return hash_file(self.run_dir / "latents" / "latents.json")

    def items(self, split: str) -> list[dict[str, str]]:
        """One item per cached view: ``file``, ``case``, ``subject``."""
        folder = self.run_dir / "latents"
        return [{**item, "file": str(folder / item["file"])} for item in self.facts["items"][split]]


class LoadLatent(Transform):
    """Read a cached latent: its normalised posterior, the encoded mask, and which cells are valid.

    Args:
        latents: the run's latents.
        mask: how to encode the masks.
    """

    def __init__(self, latents: Latents, mask: MaskEncoding) -> None:
        self.space, self.mask = latents.space, mask

    def __call__(self, item: Mapping[str, str]) -> dict[str, Tensor]:
        """``mean`` and ``std`` ``(C, x, y, z)``, ``valid`` ``(1, x, y, z)``, ``mask`` ``(M, x, y, z)``; float32.

        Raises:
            FibldmError: another autoencoder made this latent.
        """
        with safe_open(item["file"], framework="pt") as content:
            self.space.check_autoencoder(content.metadata()["autoencoder"], item["file"])
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        posterior = Posterior(tensors["mean"][None], tensors["std"][None])
        mean, std = self.space.normalise_posterior(posterior)
        mask = self.mask.encode(tensors["labels"][None])
        return {"mean": mean[0], "std": std[0], "valid": tensors["valid"], "mask": mask[0]}


class EncodeStage:
    """Encode every training and validation case once, with a few augmented views of the training cases.

    A view is made as the plain case is, then augmented together with its mask by transforms seeded by
    (seed, case, view). Views that lie there already are kept, so an interrupted run goes on.

    Args:
        run_dir: the run folder.
        datalist: ``{"training": [...], "validation": [...]}``, items with ``image``, ``label``, ``case``, ``subject``.
        preprocessing: to the model grid: ``image``, ``label`` and ``valid``.
        augmentation: random, on the three together.
        views: of every training case, the plain one included.
        facts: goes into ``latents.json`` as it is: channels, labels, intensity, grid, envelope, licence, ...
        inputs: fingerprints of the data.
        seed: of the augmentation.
        device: to encode on.
        restart: begin anew although the folder holds another configuration's latents.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        datalist: dict[str, list[dict[str, Any]]],
        preprocessing: Compose,
        augmentation: Compose,
        views: int,
        facts: dict[str, Any],
        inputs: dict[str, str],
        seed: int,
        device: torch.device,
        restart: bool = False,
    ) -> None:
        self.run_dir, self.datalist, self.facts, self.inputs = Path(run_dir), datalist, facts, inputs
        self.preprocessing, self.augmentation, self.views = preprocessing, augmentation, views
        self.seed, self.device, self.restart = seed, device, restart

    def run(self) -> None:
        """Write the latents and ``latents.json``, or say that they are done.

        Raises:
            FibldmError: the autoencoder is not trained, or the folder holds latents of other inputs.
        """
        stage = StageFolder(self.run_dir, "autoencoder")
        autoencoder = stage.require()["weights"]
        folder = StageFolder(self.run_dir, "latents")
        inputs = {**self.inputs, "autoencoder": autoencoder}
        config = {key: value for key, value in running_parser().get().items() if key != "epochs"}
        if folder.begin(config, inputs, restart=self.restart) == "done":
            _logger.info("latents: done already (%s), nothing to encode", folder.path)
            return
        first_stage = FrozenFirstStage(stage.trained()).to(self.device)
        items = {split: self._encode(split, first_stage, autoencoder) for split in ("training", "validation")}
        space = LatentSpace.fit(self._posteriors(items["training"]), autoencoder)
        write_json(
            folder.path / "latents.json",
            {"compression": first_stage.compression, "space": space.to_dict(), **self.facts, "items": items},
        )
        folder.finish(epochs=0, latents=sum(len(part) for part in items.values()))
        _logger.info("latents: %d training and %d validation views", len(items["training"]), len(items["validation"]))

    def _encode(self, split: str, first_stage: FrozenFirstStage, autoencoder: str) -> list[dict[str, str]]:
        views = self.views if split == "training" else 1
        items = []
        console = Console(stderr=True)
        for index, case in enumerate(
            track(self.datalist[split], f"encode {split}", console=console, disable=not console.is_terminal)
        ):
            names = [f"{split}/{case['case']}_view-{view}.safetensors" for view in range(views)]
            missing = [view for view, name in enumerate(names) if not (self._folder / name).exists()]
            prepared = self.preprocessing(case) if missing else {}
            for view in missing:
                self._write(self._view(prepared, index, view), self._folder / names[view], first_stage, autoencoder)
            items += [{"file": name, "case": case["case"], "subject": str(case["subject"])} for name in names]
        return items

    @property
    def _folder(self) -> Path:
        return self.run_dir / "latents"

    def _view(self, prepared: Mapping[Hashable, Any], index: int, view: int) -> dict[str, Tensor]:
        item = dict(prepared)
        if view:
            self.augmentation.set_random_state(seed=key_seed(self.seed, index, view))
            item = self.augmentation(item)
        return {key: _plain(item[key]) for key in ("image", "label", "valid")}

    def _write(self, item: dict[str, Tensor], file: Path, first_stage: FrozenFirstStage, autoencoder: str) -> None:
        posterior = first_stage.encode(item["image"][None].float().to(self.device))
        tensors = {
            "mean": posterior.mean[0].cpu().contiguous(),
            "std": posterior.std[0].cpu().contiguous(),
            "labels": item["label"].round().to(torch.uint8).contiguous(),
            "valid": F.avg_pool3d(item["valid"][None].float(), first_stage.compression)[0].contiguous(),
        }
        with atomic_path(file) as temporary:
            save_file(tensors, temporary, metadata={"autoencoder": autoencoder})

    def _posteriors(self, items: Sequence[dict[str, str]]) -> Iterator[Posterior]:
        for item in items:
            with safe_open(self._folder / item["file"], framework="pt") as content:
                yield Posterior(content.get_tensor("mean")[None], content.get_tensor("std")[None])


def _plain(value: Tensor) -> Tensor:
    return value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)
