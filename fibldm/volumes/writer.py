"""Writing synthetic volumes: the mask's geometry, the mark, and where they come from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Extension

from fibldm.errors import FibldmError
from fibldm.files import atomic_path, write_json
from fibldm.volumes.grid import Affine, Array, Volume

_COMMENT = 6
_SCANNER = 1


def write_synthetic(path: Path, volume: Volume | Sequence[Volume], provenance: dict[str, Any]) -> None:
    """Write a synthetic volume as NIfTI with its sidecar; there is no way to leave the mark out.

    It says so three times: ``descrip`` starts with ``SYNTHETIC``, a JSON header extension and the sidecar
    (``<stem>.json``) hold the whole provenance. The sidecar is in place before the volume is, so that no volume is ever
    without one.

    Args:
        path: ends in ``.nii.gz``.
        volume: in its final units and type; of several channels, one for each, all on one grid.
        provenance: JSON-able; ``synthetic: true`` is added, whatever it says itself.

    Raises:
        FibldmError: the volume holds a value that is not finite, or cannot be written.
    """
    channels = [volume] if isinstance(volume, Volume) else volume
    array = channels[0].array if len(channels) == 1 else np.stack([channel.array for channel in channels], axis=-1)
    if not np.isfinite(array).all():
        raise FibldmError(f"a synthetic volume must be finite; {path.name} is not", "train the run longer")
    facts = {"synthetic": True} | provenance | {"synthetic": True}
    image = nifti(array, channels[0].affine, "SYNTHETIC by FibLDM, not a patient")
    image.header.extensions.append(Nifti1Extension(_COMMENT, json.dumps(facts).encode()))
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)
        write_json(sidecar(path), facts)


def write_labels(path: Path, labels: Volume) -> None:
    """Write a label volume as NIfTI on its own grid.

    Raises:
        FibldmError: the file cannot be written.
    """
    write_nifti(path, labels.array, labels.affine, "label map")


def write_nifti(path: Path, array: Array, affine: Affine, description: str = "") -> None:
    """Write voxels ``(X, Y, Z)`` or ``(X, Y, Z, C)`` as `nifti` makes them.

    Raises:
        FibldmError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        nibabel.save(nifti(array, affine, description), temporary)


def nifti(array: Array, affine: Affine, description: str = "") -> nibabel.Nifti1Image:
    """A NIfTI image in millimetres with equal sform and qform (a sheared affine has no qform)."""
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, code=_SCANNER)
    image.set_qform(affine, code=_SCANNER)
    if not np.allclose(image.get_qform(), affine, atol=1e-4):
        image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()[:79]
    return image


def sidecar(path: Path) -> Path:
    """The JSON file beside a volume."""
    return path.with_name(f"{volume_stem(path)}.json")


def volume_stem(path: Path) -> str:
    """The file name without ``.nii`` or ``.nii.gz``."""
    return path.name.removesuffix(".gz").removesuffix(".nii")
