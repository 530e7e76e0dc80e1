"""Images of SimpleITK and TorchIO as volumes, and back: the same voxels at the same places.

SimpleITK has physical points in LPS+ and arrays in index order ``(Z, Y, X)``; TorchIO has an affine to RAS+ and
tensors ``(C, X, Y, Z)``, as FibLDM.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fibldm.errors import FibldmError
from fibldm.volumes.grid import LPS_TO_RAS, Affine, Volume, shear

if TYPE_CHECKING:
    import SimpleITK
    import torchio

_ORTHOGONAL = 1e-4


def as_volume(image: Any) -> Volume:
    """A volume as it is, or one of another library.

    Args:
        image: `Volume`, ``SimpleITK.Image``, ``torchio.LabelMap`` or ``torchio.ScalarImage``, or a ``torchio.Subject``
            with one label map.

    Raises:
        FibldmError: it is none of these, not 3-D, of several channels, or a subject with none or several label maps.
    """
    if isinstance(image, Volume):
        return image
    library = type(image).__module__.partition(".")[0]
    if library == "SimpleITK":
        return _of_sitk(image)
    if hasattr(image, "get_images_dict"):
        return _of_torchio(_label_map(image))
    if hasattr(image, "data") and hasattr(image, "affine"):
        return _of_torchio(image)
    raise FibldmError(
        f"a mask must be a Volume, a SimpleITK.Image, or a LabelMap or Subject of torchio; got {type(image).__name__}",
        "fibldm.volumes.formats.nifti.read_volume reads one from a file",
    )


def to_sitk(channels: Sequence[Volume]) -> "SimpleITK.Image":
    """Volumes on one grid as a ``SimpleITK.Image``, of several channels with vector pixels.

    Raises:
        FibldmError: the axes are not at right angles, which SimpleITK has no place for.
    """
    import SimpleITK

    lps = LPS_TO_RAS @ channels[0].affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    if shear(lps) > _ORTHOGONAL:
        raise FibldmError(
            "an image of SimpleITK must have axes at right angles; these are sheared", "resample it first"
        )
    arrays = [np.ascontiguousarray(volume.array.transpose(2, 1, 0)) for volume in channels]
    several = len(arrays) > 1
    image = SimpleITK.GetImageFromArray(np.stack(arrays, axis=-1) if several else arrays[0], isVector=several)
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def to_torchio(channels: Sequence[Volume]) -> "torchio.ScalarImage":
    """Volumes on one grid as a ``torchio.ScalarImage``."""
    import torch
    import torchio

    arrays = np.stack([volume.array for volume in channels])
    return torchio.ScalarImage(tensor=torch.from_numpy(arrays), affine=channels[0].affine)


def _of_sitk(image: "SimpleITK.Image") -> Volume:
    import SimpleITK

    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise FibldmError(
            f"an image must be 3-D with one component a pixel; it has {image.GetDimension()} axes and "
            f"{image.GetNumberOfComponentsPerPixel()} components"
        )
    affine: Affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Volume(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine)


def _label_map(subject: "torchio.Subject") -> Any:
    images = subject.get_images_dict(intensity_only=False)
    maps = {name: one for name, one in images.items() if "LabelMap" in [kind.__name__ for kind in type(one).__mro__]}
    if len(maps) != 1:
        raise FibldmError(
            f"a subject must have one label map; it has {', '.join(maps) or 'none'}", "give the label map itself"
        )
    return next(iter(maps.values()))


def _of_torchio(image: "torchio.Image") -> Volume:
    array = np.asarray(image.data)
    if array.ndim != 4 or len(array) != 1:
        raise FibldmError(f"an image must have one channel, (1, X, Y, Z); its shape is {array.shape}")
    return Volume(array[0], np.asarray(image.affine, dtype=np.float64))
