"""A second image of a case, such as the MR to a CT: read and checked as the first, and written on its own grid.

It is brought to the model grid of the first image in one step when it is encoded, as in synthesis.
"""

from dataclasses import replace
from typing import Any

from fibldm.datasets.checks import PERCENTILES, extent_findings, image_findings
from fibldm.datasets.findings import Findings
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.source import Case
from fibldm.datasets.stored_image import stored_image
from fibldm.errors import FibldmError, unknown_choice
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Grid
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.scan import Files, Scan
from fibldm.volumes.second_image import SecondImages, check_overlap, covered

MODALITIES = ("ct", "mr", "pt", "other")
WHAT = "second image"

_TEMPLATES = (3, 4, 5)  # NIfTI's codes of spaces that belong to no scanner
_SHOWS_LITTLE = 0.9
_LARGEST = 2**20  # numbers of a bundle


def check_second(settings: PrepareSettings, count: int) -> None:
    """See that the settings say what second images are, where there are some.

    Args:
        settings: what the user decides.
        count: of the second images.

    Raises:
        FibldmError: they do not, or there are none.
    """
    modality, window = settings.second_modality, settings.second_window
    if modality is not None and modality not in MODALITIES:
        raise unknown_choice("`second_modality`", modality, MODALITIES)
    if count and modality is None:
        raise FibldmError(
            f"`second_modality` must say what the second images are, one of {', '.join(MODALITIES)}; nothing does",
            "give it, or take the column second_image out",
        )
    if not count and (modality is not None or window is not None):
        raise FibldmError(
            "`second_modality` and `second_window` are for data with second images; there are none",
            "name them in a column second_image of the table",
        )
    if modality == "mr" and window is not None:
        raise FibldmError(
            "`second_window` is for ct, pt and other; MR goes by percentiles of each image", "leave it out"
        )
    if modality == "other" and window is None:
        raise FibldmError("second images of the modality other need `second_window`, their range", "such as 0,255")
    if window is not None and not -_LARGEST <= window[0] < window[1] <= _LARGEST:
        raise FibldmError("`second_window` must be two increasing numbers; got {:g} and {:g}".format(*window))
    if modality is not None:
        about_second(settings)


def about_second(settings: PrepareSettings) -> SecondImages:
    """Modality and intensity of the second images.

    Raises:
        FibldmError: the window is none of HU.
    """
    if settings.second_modality == "mr":
        lower, upper = PERCENTILES  # of each image; none is ever written, so that it has no range of output
        return SecondImages("mr", Intensity("percentile", lower=lower, upper=upper, output_low=-1.0, output_high=1.0))
    usual = (0.0, 20.0) if settings.second_modality == "pt" else (-1000.0, 1000.0)
    low, high = settings.second_window or usual
    kind: Any = {"ct": "window", "pt": "suv"}.get(str(settings.second_modality), "range")
    return SecondImages(str(settings.second_modality), Intensity(kind, low=float(low), high=float(high)))


def second_image(case: Case, image: Scan, settings: PrepareSettings, findings: Findings) -> Scan | None:
    """The second image of a case on its own grid, as written; ``None`` where there is none, or an error was found.

    Args:
        case: under the name it is written by.
        image: the first one.
        settings: what is decided about the voxels.
        findings: get what is wrong.
    """
    if not case.second:
        return None
    with findings.collecting(f"{WHAT}: "):
        scan = read_second(case.second, about_second(settings), resample_tilt=settings.resample_tilt)
        if set(scan.sha256.split("+")) & set(image.sha256.split("+")):
            raise FibldmError("it must be another one than the image; both are the same file")
        first, second = _grid(image), _grid(scan)
        _check_space(image, scan)
        check_overlap(second, first)
        findings.add(scan.findings, f"{WHAT}: ")
        if (share := covered(second, first)) < _SHOWS_LITTLE:
            findings.add(
                [("warning", f"{WHAT}: it covers {100 * share:.0f} % of the image's place, all else is unknown")]
            )
        return scan
    return None


def read_second(files: Files, about: SecondImages, *, resample_tilt: bool = False) -> Scan:
    """A second image from its files, as `checked_second` gives it; ``resample_tilt`` as in `read_scan`.

    Raises:
        FibldmError: it cannot be read, or `checked_second` refuses it.
    """
    scan = read_scan(files, scanner=about.modality != "other", resample_tilt=resample_tilt, suv=about.modality == "pt")
    return checked_second(scan, about)


def checked_second(scan: Scan, about: SecondImages) -> Scan:
    """A second image as a work folder holds it; its findings are warnings.

    Raises:
        FibldmError: it is of another modality, has several channels, or its voxels are not sound.
    """
    if scan.modality not in ("", about.modality.upper()):
        raise FibldmError(f"it must be {about.modality.upper()}; its files say {scan.modality}")
    if scan.array.ndim != 3:
        raise FibldmError(f"it must be one image (X, Y, Z); it has {scan.array.shape[3]} channels", "give one of them")
    limits = (about.intensity.low, about.intensity.high) if about.modality == "other" else None
    remarks = [
        *scan.findings,
        *image_findings(scan.array, about.modality, scan.spacing, "it", limits),
        *extent_findings(scan.array.shape, scan.spacing, about.modality),
    ]
    if errors := [message for level, message in remarks if level == "error"]:
        raise FibldmError("; ".join(errors))
    return replace(scan, array=stored_image(scan.array, about.modality), findings=tuple(remarks))


def _check_space(image: Scan, second: Scan) -> None:
    """Refuse images whose millimetres are measured in different spaces, where both say in which."""
    frames = {image.frame_of_reference, second.frame_of_reference} - {""}
    spaces = {scan.space if scan.space in _TEMPLATES else 0 for scan in (image, second)}
    if len(frames) > 1 or len(spaces) > 1:
        what = "frames of reference" if len(frames) > 1 else "spaces (NIfTI's sform code)"
        raise FibldmError(
            f"it must lie in the coordinate system of the image; their files state different {what}",
            "register one to the other, and save it in the other's coordinate system",
        )


def _grid(scan: Scan) -> Grid:
    x, y, z = scan.array.shape[:3]
    return Grid((x, y, z), scan.affine)
