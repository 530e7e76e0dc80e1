"""Writing synthetic volumes: the mask's geometry, the mark, and where they come from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Extension

from fibldm.errors import FibldmError, unknown_choice
from fibldm.files import atomic_path, write_json
from fibldm.volumes.grid import KNOWN_SPACES, RIGHT_ANGLES, SCANNER, Affine, Array, Volume, shear

_COMMENT = 6
_SAME_PLACE = 0.01
"""By how many voxels sform and qform may differ; some programs take the one, some the other."""


def write_synthetic(
    path: Path,
    volume: Volume | Sequence[Volume],
    provenance: dict[str, Any],
    description: str = "SYNTHETIC by FibLDM, not a patient",
) -> None:
    """Write a synthetic volume as NIfTI with its sidecar; there is no way to leave the mark out.

    It says so three times: ``descrip`` starts with ``SYNTHETIC``, a JSON header extension and the sidecar
    (``<stem>.json``) hold the whole provenance. The sidecar is in place before the volume is, so that no volume is ever
    without one.

    Args:
        path: ends in ``.nii.gz``.
        volume: in its final units and type; of several channels, one for each, all on one grid.
        provenance: JSON-able; ``synthetic: true`` is added, whatever it says itself.
        description: begins with SYNTHETIC; at most 79 bytes.

    Raises:
        FibldmError: the volume holds a value that is not finite, its axes are not at right angles, or it cannot be
            written.
    """
    channels = [volume] if isinstance(volume, Volume) else volume
    array = channels[0].array if len(channels) == 1 else np.stack([channel.array for channel in channels], axis=-1)
    if not np.isfinite(array).all():
        raise FibldmError(f"a synthetic volume must be finite; {path.name} is not", "train the run longer")
    facts = {"synthetic": True} | provenance | {"synthetic": True}
    image = nifti(array, channels[0].affine, description, channels[0].space)
    image.header.extensions.append(Nifti1Extension(_COMMENT, json.dumps(facts).encode()))
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)
        write_json(sidecar(path), facts)


def write_labels(path: Path, labels: Volume) -> None:
    """Write a label volume as NIfTI on its own grid.

    Raises:
        FibldmError: its axes are not at right angles, or the file cannot be written.
    """
    write_nifti(path, labels.array, labels.affine, "label map", labels.space)


def write_nifti(path: Path, array: Array, affine: Affine, description: str = "", space: int = SCANNER) -> None:
    """Write voxels ``(X, Y, Z)`` or ``(X, Y, Z, C)`` as `nifti` makes them.

    Raises:
        FibldmError: as `nifti`, or the file cannot be written.
    """
    image = nifti(array, affine, description, space)
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)


def nifti(array: Array, affine: Affine, description: str = "", space: int = SCANNER) -> nibabel.Nifti1Image:
    """A NIfTI image in millimetres that nibabel and ITK place alike: by an sform, and a qform where that is as exact.

    Args:
        array: ``(X, Y, Z)`` or ``(X, Y, Z, C)``.
        affine: ``(4, 4)``, voxel index to RAS+ mm.
        description: at most 79 bytes.
        space: NIfTI's code of what the mm are measured in.

    Raises:
        FibldmError: the axes are not at right angles, which ITK would refuse to open, or the code is unknown.
    """
    if (cosine := shear(affine)) > RIGHT_ANGLES:
        raise FibldmError(
            f"a volume must have voxel axes at right angles to be written; two are "
            f"{np.degrees(np.arcsin(min(cosine, 1))):.2g} degrees off",
            "square its grid up with fibldm.volumes.grid.squared_up, or resample it",
        )
    if space not in KNOWN_SPACES:
        raise unknown_choice("the code of a coordinate system", space, KNOWN_SPACES)
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, code=space)
    image.set_qform(affine, code=space)
    if _apart(affine, image.get_qform(), array.shape[:3]) > _SAME_PLACE:  # near half a turn, a quaternion is coarse
        image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()[:79]
    return image


def _apart(affine: Affine, other: Affine, shape: tuple[int, ...]) -> float:
    """How far two affines place the voxel farthest from the first one apart, in voxels."""
    off = np.abs(np.linalg.solve(affine, other) - np.eye(4))[:3]
    return float((off[:, :3] @ shape + off[:, 3]).max())


def sidecar(path: Path) -> Path:
    """The JSON file beside a volume."""
    return path.with_name(f"{volume_stem(path)}.json")


def volume_stem(path: Path) -> str:
    """The file name without ``.nii`` or ``.nii.gz``."""
    return path.name.removesuffix(".gz").removesuffix(".nii")
