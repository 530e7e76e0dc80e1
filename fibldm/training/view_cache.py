"""The cached latents of a dataset as files: every view of every case, made, augmented, encoded, and read again."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import write_tensors
from fibldm.models.autoencoder import FrozenFirstStage, Posterior
from fibldm.models.tiling import tiled_encode
from fibldm.training.draws import key_seed
from fibldm.training.gate_ranges import GateRanges
from fibldm.volumes.datalist import SECOND_IMAGE
from fibldm.volumes.grid import Grid
from fibldm.volumes.second_image import read_on_grid

SPLITS = ("training", "validation")

Draw = Literal["sample", "mean"]


@dataclass(frozen=True)
class ViewCache:
    """The files of all views; for its attributes see `fibldm.training.encode_stage.EncodeStage`."""

    folder: Path
    datalist: dict[str, list[dict[str, Any]]]
    preprocessing: Compose
    augmentation: Compose
    views: int
    draw: Draw
    seed: int
    device: torch.device
    ranges: GateRanges

    def cases(self) -> list[tuple[str, int]]:
        """Split and place of every case."""
        return [(split, index) for split in SPLITS for index in range(len(self.datalist[split]))]

    def names(self, split: str, index: int) -> list[str]:
        """The files of a case, one of each view."""
        case = self.datalist[split][index]["case"]
        return [f"{split}/{case}_view-{view}.safetensors" for view in range(self._views(split))]

    def items(self, split: str) -> list[dict[str, str]]:
        """What ``latents.json`` says of the views of a split."""
        return [
            {"file": name, "case": case["case"], "subject": str(case["subject"])}
            for index, case in enumerate(self.datalist[split])
            for name in self.names(split, index)
        ]

    def missing(self, split: str, index: int) -> list[int]:
        """Views of a case whose files are not there, or not whole."""
        return [view for view, name in enumerate(self.names(split, index)) if not _is_whole(self.folder / name)]

    def plain_views(
        self, split: str, items: Sequence[dict[str, str]]
    ) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        """Each case of a split with the item of its first view, which is not augmented."""
        yield from zip(self.datalist[split], items[:: self._views(split)], strict=True)

    def encode(self, split: str, index: int, first_stage: FrozenFirstStage, autoencoder: str) -> None:
        """Write the views of a case that are missing.

        Raises:
            FibldmError: a latent is not finite.
        """
        names, missing = self.names(split, index), self.missing(split, index)
        prepared = self.prepared(self.datalist[split][index]) if missing else {}
        for view in missing:
            item = self.view(prepared, index, view)
            noted = self.ranges.noted(item) if split == "training" and view == 0 else {}
            self._write(item, self.folder / names[view], first_stage, autoencoder, noted)

    def prepared(self, case: Mapping[str, Any]) -> dict[Hashable, Any]:
        """A case on the model grid; where it has no mask, all of it is unknown."""
        item = dict(self.preprocessing(case))
        if SECOND_IMAGE in case:
            image = item["image"]
            grid = Grid(tuple(image.shape[1:]), image.affine.double().numpy())
            item[SECOND_IMAGE] = torch.from_numpy(read_on_grid(case[SECOND_IMAGE], grid))
        if "label" not in item:
            item["label"] = torch.full_like(item["valid"], UNKNOWN_LABEL)
        return item

    def view(self, prepared: Mapping[Hashable, Any], index: int, view: int) -> dict[str, Tensor]:
        """A view of a prepared case; the first one is as it was prepared."""
        item = dict(prepared)
        if view:
            self.augmentation.set_random_state(seed=key_seed(self.seed, index, view))
            item = self.augmentation(item)
        made = {key: plain_tensor(item[key]) for key in ("image", "label", "valid")}
        return made | ({SECOND_IMAGE: self._second(prepared, index, view)} if SECOND_IMAGE in prepared else {})

    def _second(self, prepared: Mapping[Hashable, Any], index: int, view: int) -> Tensor:
        """The second image of a view, moved as the first is: in its place, with the same draws."""
        second = plain_tensor(prepared[SECOND_IMAGE])
        if not view:
            return second
        affine = prepared["image"].affine
        voxels, known = (MetaTensor(part[None].clone(), affine=affine) for part in second)
        moved = self.view({"image": voxels, "label": prepared["label"], "valid": known}, index, view)
        inside = (moved["valid"] > 0.5).float()
        return torch.cat([moved["image"].float() * inside, inside])

    def _write(
        self,
        item: dict[str, Tensor],
        file: Path,
        first_stage: FrozenFirstStage,
        autoencoder: str,
        noted: Mapping[str, Tensor],
    ) -> None:
        posterior = tiled_encode(first_stage, item["image"][None].float().to(self.device))
        if not all(bool(part.isfinite().all()) for part in posterior):
            raise FibldmError(
                f"latents must be finite; those of {file.stem} are not", "train the autoencoder again, in float32"
            )
        tensors = {
            "mean": posterior.mean[0].cpu().contiguous(),
            # without a deviation every draw is the mean, and the scale is that of means
            "std": (posterior.std[0] if self.draw == "sample" else torch.zeros_like(posterior.std[0]))
            .cpu()
            .contiguous(),
            "labels": item["label"].round().to(torch.uint8).contiguous(),
            "valid": F.avg_pool3d(item["valid"][None].float(), first_stage.compression)[0].contiguous(),
            **noted,
        }
        if SECOND_IMAGE in item:
            tensors[SECOND_IMAGE] = item[SECOND_IMAGE].half().contiguous()
        write_tensors(file, tensors, {"autoencoder": autoencoder})

    def cells(self, items: Sequence[dict[str, str]]) -> Iterator[Posterior]:
        """The posteriors of the cells that count, ``(1, C, n)``; padding is all alike and would change the scale."""
        for item, posterior in zip(items, self.posteriors(items), strict=True):
            with safe_open(self.folder / item["file"], framework="pt") as content:
                inside = content.get_tensor("valid")[0] > 0.5
            yield Posterior(posterior.mean[..., inside], posterior.std[..., inside])

    def posteriors(self, items: Sequence[dict[str, str]]) -> Iterator[Posterior]:
        """The posteriors ``(1, C, x, y, z)`` in their files."""
        for item in items:
            with safe_open(self.folder / item["file"], framework="pt") as content:
                yield Posterior(content.get_tensor("mean")[None], content.get_tensor("std")[None])

    def plain_files(self, items: Sequence[Mapping[str, str]]) -> list[tuple[str, Path]]:
        """The patient and the file of each training case's view that is not augmented."""
        return [(item["subject"], self.folder / item["file"]) for item in items[:: self._views("training")]]

    def _views(self, split: str) -> int:
        return self.views if split == "training" else 1


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):  # which compares the length of the file with what its header says
            return True
    except (OSError, SafetensorError):
        return False


def plain_tensor(value: Tensor) -> Tensor:
    """A tensor without what MONAI knows of its place."""
    return value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)
