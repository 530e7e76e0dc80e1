"""The ranges of the quality gate, measured by the encode stage on the real volumes of all training cases.

Real ones rather than reconstructions: what a decoder does to every volume is a fault that the gate is to find. As they
are written, a percentile of MR is what it becomes on output. Each case is measured while it is encoded, and its values
lie in the file of its latent, so that any number of processes share the work and an interrupted stage goes on.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fibldm.progress import track
from fibldm.volumes.gate import Gate, Values, measure
from fibldm.volumes.intensity import Intensity

_MEASURED = "intensities"


@dataclass(frozen=True)
class GateRanges:
    """Measures training cases on the model grid.

    Attributes:
        facts: of ``latents.json``: channels, labels, intensity.
    """

    facts: Mapping[str, Any]

    @property
    def intensity(self) -> Intensity:
        return Intensity.from_dict(self.facts["intensity"])

    @property
    def channels(self) -> Sequence[str]:
        return tuple(self.facts.get("channels", ("image",)))

    def of(self, item: Mapping[str, Tensor]) -> dict[str, Values]:
        """The intensities of a case that is not augmented: its ``image`` in ``[-1, 1]``, ``label`` and ``valid``."""
        image = self.intensity.restore(item["image"].float().numpy())
        labels = item["label"][0].round().numpy().astype(np.uint8)
        return measure(self.channels, image, labels, item["valid"][0].numpy() > 0.5)

    def noted(self, item: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same as a tensor of the file of a latent, the bytes of its JSON.

        No metadata: safetensors writes two entries of them in any order, so that equal files would not be equal.
        """
        return {_MEASURED: torch.frombuffer(bytearray(json.dumps(self.of(item)).encode()), dtype=torch.uint8)}

    def fit(self, files: Sequence[tuple[str, Path]], again: Callable[[int], Mapping[str, Tensor]]) -> Gate | None:
        """The ranges of all training cases.

        Args:
            files: patient of each case, and the file of its latent that is not augmented.
            again: the case of a place among them, read for those whose file has no values.
        """
        levels = [np.atleast_1d(level) for level in self.intensity.output_range]
        low, high = (np.broadcast_to(level, len(self.channels)) for level in levels)
        width = {name: float(upper - lower) for name, lower, upper in zip(self.channels, low, high, strict=True)}
        names = {int(value): str(name) for value, name in self.facts["labels"].items()}
        return Gate.fit(list(self._read(files, again)), names=names, width=width)

    def _read(
        self, files: Sequence[tuple[str, Path]], again: Callable[[int], Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, dict[str, Values]]]:
        known = [_noted(file) for _, file in files]
        places = range(len(files))
        for place in track(places, "ranges of intensity") if None in known else places:
            yield files[place][0], known[place] or self.of(again(place))


def _noted(file: Path) -> dict[str, Values] | None:
    with safe_open(file, framework="pt") as content:
        if _MEASURED not in content.keys():
            return None
        values: dict[str, Values] = json.loads(content.get_tensor(_MEASURED).numpy().tobytes())
    return values
