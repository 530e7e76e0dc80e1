"""Figures of a few validation cases while a stage trains: which way it goes, and not how good it is."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.evaluation.cases import Sample
from fibldm.evaluation.distances import polynomial_kernel, squared_mmd
from fibldm.evaluation.ms_ssim import channel_similarity
from fibldm.evaluation.radiomics import Radiomics
from fibldm.evaluation.realism import Arrays, standardised
from fibldm.evaluation.reconstruction import image_quality

Image = NDArray[np.float32]
Labels = NDArray[np.uint8]


class PreviewFigures:
    """What `fibldm.training.preview.SampleRows` measures of its samples, on the model grid.

    Args:
        labels: names by label value, background included.
        spacing: mm along R, A, S.
    """

    def __init__(self, labels: Mapping[int | str, str], spacing: Sequence[float]) -> None:
        names = {int(value): str(name) for value, name in labels.items()}
        self.radiomics = Radiomics.on_grid(names, spacing)
        self.spacing = (float(spacing[0]), float(spacing[1]), float(spacing[2]))

    def __call__(
        self, made: Sequence[Image], real: Sequence[Image], labels: Sequence[Labels], *, follows_masks: bool
    ) -> dict[str, float]:
        """Means over the cases.

        ``ssim`` (see `image_quality`) and ``ms_ssim`` of a sample and the real volume of its mask, where samples follow
        masks, over what is not unknown and over the whole volume; ``kid``, `squared_mmd` by the polynomial kernel of
        the radiomic features of samples and of real volumes, from two cases. As the sets are small and of the same
        cases, it is near 0, or below, before the samples are as good as that.

        Args:
            made: samples ``(C, X, Y, Z)``, in ``[-1, 1]``.
            real: the same of the real volumes, in the same order.
            labels: ``(X, Y, Z)``.
            follows_masks: whether samples were made from the masks.
        """
        figures = {}
        if follows_masks:
            triples = list(zip(real, made, labels, strict=True))
            ssim = [image_quality(one, other, {"": _known(mask)})["ssim"] for one, other, mask in triples]
            figures["ssim"] = float(np.mean(ssim))
            figures["ms_ssim"] = float(np.mean([channel_similarity(one, other) for one, other, _ in triples]))
        if len(made) > 1:
            features = [
                np.stack(
                    [
                        self.radiomics(Sample(image, mask, _known(mask), self.spacing))
                        for image, mask in zip(part, labels, strict=True)
                    ]
                )
                for part in (made, real)
            ]
            scaled = standardised(Arrays(features[0], features[1], features[1]))
            figures["kid"] = squared_mmd(scaled.synthetic, scaled.real, polynomial_kernel)
        return figures


def _known(labels: Labels) -> NDArray[np.bool_]:
    """Where it is known what is asked for; everywhere in a volume of unknown."""
    known = labels != UNKNOWN_LABEL
    return known if known.any() else np.ones_like(known)
