"""Can one tell from a generator's weights which scans it learned from?

A network that remembers its training scans denoises them better than others. Its error at fixed noise and times is the
attack that Carlini et al. 2023, "Extracting training data from diffusion models", section 4, and Matsumoto et al. 2023,
"Membership inference attacks against diffusion models", section 3, begin with; who has other means may find more.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from fibldm import UNKNOWN_LABEL
from fibldm.models.tiling import tiled_encode
from fibldm.synthesis import SynthesisRequest, Synthesizer
from fibldm.volumes.grid import Volume, resample

TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Of noise: late enough that a network says what it knows of a scan, and early enough that the scan is still told."""

DRAWS = 2
_AIR = -1.0
_FALSE_POSITIVES = 0.01


@torch.no_grad()
def denoising_error(synthesizer: Synthesizer, scan: Volume, mask: Volume | None, name: str) -> float:
    """Mean logarithm of the squared error of the latent that a network expects, over fixed times and noise.

    Args:
        synthesizer: its network must see masks.
        scan: of one channel, in its units.
        mask: of its labels; None leaves them unknown.
        name: decides the noise.

    Raises:
        FibldmError: the mask has labels that the training data lack, or a voxel is not finite.
    """
    labels = mask or Volume(np.full(scan.array.shape, UNKNOWN_LABEL, dtype=np.uint8), scan.affine)
    request = SynthesisRequest(labels, name)
    prepared = synthesizer.prepare(request, allow_extrapolation=True)
    turned = scan.canonical()
    normalised = Volume(synthesizer.intensity.normalise(turned.array), turned.affine)
    image = resample(normalised, prepared.grid, kind="image", fill=_AIR).array
    device = next(synthesizer.network.parameters()).device
    volume = torch.from_numpy(image)[None, None].to(device)
    z_0 = synthesizer.space.normalise(tiled_encode(synthesizer.first_stage, volume).mean.to(device))
    denoise, generator, errors = synthesizer.denoiser([prepared]), request.generator(0), []
    for time in TIMES * DRAWS:
        noise, t = torch.randn(z_0.shape, generator=generator).to(device), torch.full((1,), time)
        expected = denoise(synthesizer.process.diffuse(z_0, noise, t), t).z_0
        errors.append(float((expected - z_0).square().mean().log()))
    return float(np.mean(errors))


def told_apart(training: Sequence[float], held_out: Sequence[float]) -> dict[str, Any]:
    """How well lower values tell training scans from held-out ones: AUC with its interval, and TPR at 1 % FPR.

    0.5 is chance. The 95 % interval is that of DeLong et al. 1988, "Comparing the areas under two or more correlated
    receiver operating characteristic curves". Of fewer than 100 held-out scans none may be taken for a training scan.

    Args:
        training: of each patient, one value; at least two.
        held_out: the same.
    """
    train, other = np.asarray(training), np.asarray(held_out)
    wins = (train[:, None] < other[None]) + 0.5 * (train[:, None] == other[None])
    auc = float(wins.mean())
    variance = wins.mean(axis=1).var(ddof=1) / len(train) + wins.mean(axis=0).var(ddof=1) / len(other)
    reach = float(stats.norm.ppf(0.975) * np.sqrt(variance))
    allowed = int(_FALSE_POSITIVES * len(other))
    limit: NDArray[np.float64] = np.sort(other)[allowed]
    return {
        "auc": auc,
        "low": max(0.0, auc - reach),
        "high": min(1.0, auc + reach),
        "tpr_at_1_percent_fpr": float((train < limit).mean()),
        "training": len(train),
        "held_out": len(other),
    }
