"""What the autoencoder loses of real test scans: no synthetic volume is better than its reconstructions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated, FeatureCache, Sample, each_channel
from fibldm.evaluation.faithfulness import Measured, described, foreground, mean_estimates, segmentation
from fibldm.evaluation.ms_ssim import channel_similarity
from fibldm.evaluation.perceptual import PlaneDistance
from fibldm.evaluation.results import Section
from fibldm.evaluation.segmentation_metrics import dice_by_label, measured_labels
from fibldm.evaluation.segmenter import Segmenter
from fibldm.evaluation.spectrum import channel_spectra, frequency_edges, spectrum_distance
from fibldm.evaluation.statistics import Estimate, estimate
from fibldm.files import hash_value
from fibldm.models.autoencoder import FrozenFirstStage
from fibldm.progress import track
from fibldm.runs import StageFolder
from fibldm.synthesis import Synthesizer
from fibldm.volumes.grid import long_axes
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.pictures import Pair, channel_pairs, write_comparison

PICTURE = "reconstruction.png"

_RANGE = 2.0
_HIGHEST_PSNR = 100.0
_SSIM_SIGMA = 1.5
_SSIM_WINDOW = 11
_PICTURED = 4

Image = NDArray[np.float32]
Region = NDArray[np.bool_]


@dataclass(frozen=True)
class Reconstructor:
    """A volume through the autoencoder and back: its posterior's mean, decoded; ``fingerprint`` is of its weights."""

    first_stage: FrozenFirstStage
    fingerprint: str
    device: torch.device

    @classmethod
    def from_run(cls, run_dir: str | Path, device: str | torch.device = "cpu") -> "Reconstructor":
        """The autoencoder of a run.

        Raises:
            FibldmError: it is not trained.
        """
        stage = StageFolder(Path(run_dir), "autoencoder")
        first_stage = FrozenFirstStage(stage.trained()).to(device)
        return cls(first_stage, stage.require()["weights"], torch.device(device))

    @classmethod
    def from_bundle(
        cls, bundle: str | Path, device: str | torch.device = "cpu", *, trust: bool = False
    ) -> "Reconstructor":
        """The autoencoder of a bundle.

        Raises:
            FibldmError: the bundle is refused.
        """
        made = Synthesizer.from_bundle(bundle, trust=trust, device=device)
        return cls(made.first_stage, made.source["autoencoder"], torch.device(device))

    def __call__(self, image: Image) -> Image:
        """The reconstruction, float32 in ``[-1, 1]``, of an image ``(X, Y, Z)`` or ``(C, X, Y, Z)`` of the same range.

        Raises:
            FibldmError: an axis is not divisible by the compression of the autoencoder.
        """
        volume = torch.from_numpy(image).reshape(1, -1, *image.shape[-3:]).float().to(self.device)
        decoded = self.first_stage.decode(self.first_stage.encode(volume).mean)
        reconstruction: Image = decoded.clamp(-1, 1).float().cpu().numpy().reshape(image.shape)
        return reconstruction


def measure_reconstruction(
    evaluated: Evaluated,
    segmenter: Segmenter,
    reconstructor: Reconstructor,
    *,
    pictures: Path,
    planes: PlaneDistance | None = None,
) -> Section:
    """Real test scans against their reconstructions.

    Figures are ``psnr`` (dB), ``ssim`` and ``mae`` (HU for a window, else of the range ``[-1, 1]``), see
    `image_quality`, over the field of view and per label as ``<figure>/<label>``; ``ms_ssim`` of the whole volume, see
    `ms_ssim.ms_ssim`; ``lpips`` and ``lpips/<plane>``, where there is a network for it, see `PlaneDistance`;
    ``dice_change`` and ``dice_change/<label>``, the Dice of what a segmenter finds in the reconstruction minus that of
    the real scan, negative where the autoencoder loses what the segmenter goes by; and ``spectrum`` (dB), see
    `spectrum_distance`, whose ``real_vs_real`` is that of one half of the test patients and the other. The rest compare
    a scan with itself, which has no counterpart among real scans: their ``real_vs_real`` is None.

    Of several channels, `image_quality` and MS-SSIM are the mean of them, and the spectra stand one after the other.

    The four scans with the largest error are drawn in ``reconstruction.png`` of the folder ``pictures``.

    Raises:
        FibldmError: the model grid is too small, or the picture cannot be written.
    """
    values, spectra = [], []
    for case in track(evaluated.real("test"), "reconstruction"):
        measured, spectrum = _measured(evaluated, case, segmenter, reconstructor, planes)
        values.append(measured)
        spectra.append(spectrum)
    worst = sorted(values, key=lambda row: -row.values["mae"])[:_PICTURED]
    write_comparison(pictures / PICTURE, [pair for row in worst for pair in _pairs(evaluated, row, reconstructor)])
    facts = {
        "autoencoder": reconstructor.fingerprint,
        "segmenter": segmenter.fingerprint,
        "units": {"psnr": "dB", "mae": _unit(evaluated.intensity)[1], "spectrum": "dB"},
        "ssim": {"sigma": _SSIM_SIGMA, "window": _SSIM_WINDOW},
        "picture": PICTURE,
        **({} if planes is None else {"lpips": planes.facts}),
    }
    figures = mean_estimates(values) | {"spectrum": _spectrum_figure(values, np.stack(spectra))}
    return Section(figures, facts, described(values))


def image_quality(real: Image, made: Image, regions: Mapping[str, Region], *, unit: float = 1) -> dict[str, float]:
    """``psnr<name>``, ``ssim<name>`` and ``mae<name>`` of an image in each region; of several channels, their means.

    PSNR is ``10 log10(2^2 / MSE)`` dB, at most 100, where 2 is the range of ``[-1, 1]``. SSIM is the mean, over the
    region, of the map of Wang et al. 2004, "Image quality assessment", eq. 13, in 3-D (of a slice, in 2-D) with their
    Gaussian window of sigma 1.5 voxels.

    Args:
        real: ``(X, Y, Z)`` or ``(C, X, Y, Z)``, in ``[-1, 1]``.
        made: of the same shape and range.
        regions: where to measure, ``(X, Y, Z)`` by name, none empty.
        unit: what a step of 1 in ``[-1, 1]`` is in the unit of MAE.

    Raises:
        FibldmError: an axis is shorter than the window of SSIM.
    """
    pairs = zip(each_channel(real), each_channel(made), strict=True)
    values = [_channel_quality(one, other, regions, unit) for one, other in pairs]
    return {name: float(np.mean([value[name] for value in values])) for name in values[0]}


def _channel_quality(real: Image, made: Image, regions: Mapping[str, Region], unit: float) -> dict[str, float]:
    if min(real.shape[axis] for axis in long_axes(real.shape)) < _SSIM_WINDOW:
        raise FibldmError(f"SSIM needs at least {_SSIM_WINDOW} voxels along each axis; got {real.shape}")
    one, other = (image.squeeze().astype(np.float64) for image in (real, made))
    _, similarity = structural_similarity(
        one, other, data_range=_RANGE, gaussian_weights=True, sigma=_SSIM_SIGMA, use_sample_covariance=False, full=True
    )
    lowest = _RANGE**2 / 10 ** (_HIGHEST_PSNR / 10)  # a clipped region may come back without any error
    values: dict[str, float] = {}
    for name, region in regions.items():
        inside = region.squeeze()
        difference = (other - one)[inside]
        error = max(float(np.square(difference).mean()), lowest)
        values |= {
            f"psnr{name}": float(10 * np.log10(_RANGE**2 / error)),
            f"ssim{name}": float(similarity[inside].mean()),
            f"mae{name}": unit * float(np.abs(difference).mean()),
        }
    return values


def _measured(
    evaluated: Evaluated,
    case: Case,
    segmenter: Segmenter,
    reconstructor: Reconstructor,
    planes: PlaneDistance | None,
) -> tuple[Measured, NDArray[np.float64]]:
    """The figures of one scan, and the spectra of scan and reconstruction, ``(2, K)``."""
    sample, names = evaluated.read(case), foreground(evaluated)
    made = _inside(sample, reconstructor)
    labels = measured_labels(sample.labels, names)
    regions = {"": sample.valid} | {f"/{names[label]}": sample.labels == label for label in labels}
    values = image_quality(sample.image, made, regions, unit=_unit(evaluated.intensity)[0])
    values["ms_ssim"] = channel_similarity(sample.image, made)
    if planes is not None:
        cache = FeatureCache(evaluated, "lpips", hash_value([planes.fingerprint, reconstructor.fingerprint]))
        distances = cache.get(case, partial(planes, made=made))
        values |= dict(zip(planes.names(made.shape[-3:]), distances.tolist(), strict=True))
    before = dice_by_label(*sample.against(segmentation(evaluated, case, segmenter)), labels)
    after = dice_by_label(*sample.against(segmenter.segment(made)), labels)
    changes = {f"dice_change/{names[label]}": after[label] - before[label] for label in labels}
    if changes:
        values |= {"dice_change": float(np.mean(list(changes.values()))), **changes}
    # the bins of the model grid, for cases that keep a spacing of their own
    edges = frequency_edges(evaluated.grid.size, evaluated.grid.spacing)
    spectra = [channel_spectra(image, sample.spacing, edges=edges) for image in (sample.image, made)]
    return Measured(case, values), np.stack(spectra)


def _inside(sample: Sample, reconstructor: Reconstructor) -> Image:
    """The reconstruction, with the image itself in the padding, which no one ever sees."""
    return np.where(sample.valid, reconstructor(sample.image), sample.image)


def _unit(intensity: Intensity) -> tuple[float, str]:
    """What a step of 1 in ``[-1, 1]`` is, and the unit of that."""
    if intensity.kind == "percentile":
        return 1.0, "of [-1, 1]"
    unit = intensity.units if intensity.kind != "range" else "units of the data"
    return (intensity.high - intensity.low) / 2, unit


def _spectrum_figure(measured: Sequence[Measured], spectra: NDArray[np.float64]) -> Estimate:
    """Distance of the patients' mean spectra; two halves of the patients compare at least two."""
    subjects = np.array([row.case.subject for row in measured])
    patients = dict.fromkeys(subjects.tolist())
    real, made = np.stack([spectra[subjects == patient].mean(axis=0) for patient in patients], axis=1)
    halves = spectrum_distance(real[::2], real[1::2]) if len(patients) > 1 else None
    return estimate(lambda chosen: spectrum_distance(made[chosen], real[chosen]), len(patients), real_vs_real=halves)


def _pairs(evaluated: Evaluated, row: Measured, reconstructor: Reconstructor) -> list[Pair]:
    sample, (_, unit) = evaluated.read(row.case), _unit(evaluated.intensity)
    title, made = f"{row.case.name}: MAE {row.values['mae']:.3g} {unit}", _inside(sample, reconstructor)
    names, channels = ("real", "reconstruction"), evaluated.channels
    return channel_pairs(title, sample.image, made, spacing=sample.spacing, names=names, channels=channels)
