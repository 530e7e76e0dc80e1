"""One segmenter of real scans for every measurement: a small 3-D UNet, trained once for each content and setting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.layers import SkipConnection
from numpy.typing import NDArray
from torch import Tensor, nn

from fibldm.evaluation.cases import Case, Evaluated
from fibldm.files import hash_value
from fibldm.runs import StageFolder, decisive
from fibldm.runs.config_files import ConfigFiles
from fibldm.runs.configuration import Configuration, stage_configuration
from fibldm.verbatim import verbatim
from fibldm.volumes.datalist import ANNOTATED, read_datalist, with_annotation


@dataclass(frozen=True)
class Segmenter:
    """Finds the labels of a run in a volume; in float32, so that a figure does not depend on the device.

    Attributes:
        network: `monai.networks.nets.UNet` in evaluation mode, one output channel for each label.
        labels: label values in the order of the channels.
        fingerprint: SHA-256 of the weights.
        window: voxels along R, A, S that the network sees at once.
    """

    network: nn.Module
    labels: tuple[int, ...]
    fingerprint: str
    window: tuple[int, ...]

    def segment(self, image: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The label of every voxel.

        Args:
            image: ``(X, Y, Z)`` or ``(C, X, Y, Z)`` on the model grid, in ``[-1, 1]``.

        Returns:
            Label values ``(X, Y, Z)``, those of `labels`.
        """
        channels = self._logits(image).argmax(dim=0).cpu().numpy()
        return np.array(self.labels, dtype=np.uint8)[channels]

    def features(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Means over the volume of what the deepest layer gives: a description of what the volume shows.

        Args:
            image: ``(X, Y, Z)`` or ``(C, X, Y, Z)`` on the model grid, in ``[-1, 1]``.

        Returns:
            ``(D,)``; of a volume larger than `window`, the mean over its windows.
        """
        described: NDArray[np.float32] = _means(self._deepest(image)).cpu().numpy()
        return described

    def described(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """`features` of the whole volume and of each slab of it, in one pass.

        A slab lies across an axis and is as thick as a voxel of the deepest layer, which sees beyond it; windows have
        slabs of their own.

        Args:
            image: ``(X, Y, Z)`` or ``(C, X, Y, Z)`` on the model grid, in ``[-1, 1]``.

        Returns:
            ``(1 + S, 1 + D)``: the first column is the axis across which a slab lies, and -1 in the first row, which is
            the whole volume.
        """
        maps = self._deepest(image)
        rows = [torch.cat([torch.full((1,), -1.0), _means(maps).cpu()])[None]]
        for axis in range(3):
            in_plane = tuple(1 + other for other in range(3) if other != axis)
            slabs = torch.cat([part[0].mean(dim=in_plane).T for part in maps]).cpu()
            rows.append(torch.cat([torch.full((len(slabs), 1), float(axis)), slabs], dim=1))
        described: NDArray[np.float32] = torch.cat(rows).numpy()
        return described

    def _deepest(self, image: NDArray[np.float32]) -> list[Tensor]:
        """What the deepest layer gives, ``(1, D, x, y, z)`` for each window."""
        maps: list[Tensor] = []
        # MONAI's UNet nests each level in the `SkipConnection` of the level above it
        *_, deepest = (part.submodule for part in self.network.modules() if isinstance(part, SkipConnection))
        hook = deepest.register_forward_hook(lambda _, __, output: maps.append(output))
        try:
            self._logits(image)
        finally:
            hook.remove()
        return maps

    @torch.inference_mode()
    def _logits(self, image: NDArray[np.float32]) -> Tensor:
        device = next(self.network.parameters()).device
        volume = torch.from_numpy(np.ascontiguousarray(image)).reshape(1, -1, *image.shape[-3:]).to(device)
        logits: Tensor = SlidingWindowInferer(self.window, overlap=0.5, mode="gaussian")(volume, self.network)[0]
        return logits


def trained_segmenter(
    evaluated: Evaluated,
    *,
    cases: Sequence[Case] | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> Segmenter:
    """The segmenter of the training split, trained where there is none yet of this data and these settings.

    It lies in ``RUN/evaluation/segmenter/<hash>``, where the hash is of all that decides it: other data or settings
    get a segmenter of their own, and one that was interrupted goes on.

    Args:
        evaluated: the run and its work folder, whose model grid, intensity and labels it takes.
        cases: with masks, to train on in place of the training split; validation stays that of the work folder.
        overrides: of ``configs/train_segmenter.yaml``, ``key::sub`` to value, such as ``{"steps": 1000}``; "configs"
            names configurations that change it, such as ``["augment_torchio_mr"]``.
        device: to train and to measure on; None takes CUDA where there is one.

    Raises:
        FibldmError: an override is not known, or a file of the work folder or of the segmenter cannot be read.
    """
    settings = {
        "spacing": list(evaluated.grid.spacing),
        "size": list(evaluated.grid.size),
        "intensity": {
            "_target_": "fibldm.volumes.intensity.Intensity.from_dict",
            "values": verbatim(evaluated.intensity.to_dict()),
        },
        "labels": sorted(evaluated.labels),
        **({} if cases is None else _instead(evaluated, cases)),
        **(overrides or {}),
    }
    configs = list(settings.pop("configs", ()))
    if any(case.annotated is not None for case in (*(cases or ()), *evaluated.real("training", "validation"))):
        configs.append("partial_masks")
    configuration = stage_configuration(
        "segmenter", work=evaluated.work, run_dir=evaluated.folder, configs=configs, overrides=settings
    )
    stage = StageFolder(evaluated.folder, f"segmenter/{_key(configuration, evaluated)}")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    places = {"stage::name": stage.name, "device": str(chosen)}
    replace(configuration, overrides={**configuration.overrides, **places}).run()
    network, window = stage.trained().to(chosen), stage.component("window")
    return Segmenter(network, tuple(settings["labels"]), stage.require()["weights"], window)


def _means(maps: Sequence[Tensor]) -> Tensor:
    """Of maps ``(1, D, x, y, z)``: the mean of each, and of these, ``(D,)``."""
    return torch.stack([part.mean(dim=(0, 2, 3, 4)) for part in maps]).mean(dim=0)


def _instead(evaluated: Evaluated, cases: Sequence[Case]) -> dict[str, Any]:
    """Overrides that train on other cases, known by their content."""
    items = [{"image": str(case.image), "label": str(case.label), "case": case.name} for case in cases]
    content = [evaluated.key(case) for case in cases]
    annotated = [case.annotated for case in cases]
    if any(labels is not None for labels in annotated):
        known = [{} if labels is None else {ANNOTATED: labels} for labels in annotated]
        told = [item | more for item, more in zip(items, known, strict=True)]
        items, content = with_annotation(told, sorted(evaluated.labels)), [*content, str(annotated)]
    return {"train::dataset::data": verbatim(items), "stage::inputs::data": hash_value(content)}


def _key(configuration: Configuration, evaluated: Evaluated) -> str:
    """A hash of what decides a segmenter: configuration and data, but not where they lie."""
    config = ConfigFiles.load_config_files([str(file) for file in configuration.files])
    places = ("work", "run_dir", "train::dataset::data")
    chosen = {key: value for key, value in configuration.overrides.items() if key not in places}
    return hash_value([decisive(config), decisive(chosen, config), read_datalist(evaluated.work)["content"]])[:12]
