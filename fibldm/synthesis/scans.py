"""Scans that are asked for as a condition: files or volumes, opened as a work folder would hold them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fibldm.datasets.layouts.entries import entry_files, is_dicom
from fibldm.datasets.second_image import checked_second, read_second
from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Grid, Volume
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.interchange import as_volume
from fibldm.volumes.scan import Files, Scan
from fibldm.volumes.second_image import SecondImages, check_overlap, on_grid

_HELD = 2  # images on model grids, as several volumes are drawn of one


@dataclass(frozen=True)
class AskedScan:
    """A scan, see `fibldm.models.conditions.image.OpenedScan`; two of the same content are equal.

    Attributes:
        name: of its file; of DICOM, whose names may tell the patient, only what it is.
        sha256: of the files, or of voxels and affine.
        source: its files, or the volume itself.
    """

    name: str
    sha256: str
    source: Files | Volume = field(compare=False, repr=False)

    @classmethod
    def open(cls, asked: Any) -> "AskedScan | None":
        """What somebody asks for; its voxels are not read yet. None asks for nothing.

        Args:
            asked: a file, a folder with the slices of a series, or a volume as `as_volume` takes it.

        Raises:
            FibldmError: there is no such file, or it is none of these.
        """
        if asked is None or isinstance(asked, cls):
            return asked
        return cls.of_path(Path(asked)) if isinstance(asked, str | Path) else cls._of_volume(as_volume(asked))

    @classmethod
    def of_path(cls, path: Path) -> "AskedScan":
        """A file, or a folder with the slices of a series.

        Raises:
            FibldmError: there is no such file, or it is neither.
        """
        try:
            files = entry_files(path)
        except (FibldmError, OSError) as error:
            why = error.message if isinstance(error, FibldmError) else f"the path that came: {error.strerror}"
            raise FibldmError(f"an image must be a file, or a folder with one series; {why}") from error
        dicom = len(files) > 1 or is_dicom(files[0])
        sha256 = hash_file(files[0]) if len(files) == 1 else hash_value(sorted(hash_file(file) for file in files))
        return cls("a DICOM series" if dicom else files[0].name, sha256, files)

    @classmethod
    def _of_volume(cls, volume: Volume) -> "AskedScan":
        turned = volume.canonical()
        content = hashlib.sha256(np.ascontiguousarray(turned.array).tobytes())
        content.update(f"{turned.array.shape} {turned.array.dtype.str} {turned.affine.tolist()}".encode())
        return cls("a volume", content.hexdigest(), turned)

    @cached_property
    def grid(self) -> Grid:
        """Where its voxels lie, in RAS+ order."""
        scan = self._as_read()
        x, y, z = scan.array.shape[:3]
        return Grid((x, y, z), scan.affine)

    def on(self, grid: Grid, *, modality: str, intensity: Mapping[str, Any]) -> Tensor:
        """Voxels and where they are known, ``(2, X, Y, Z)``, on a model grid.

        Raises:
            FibldmError: it is no sound image of this modality, or does not lie there.
        """
        affine = tuple(float(value) for value in grid.affine.ravel())
        return _on_grid(self, (grid.shape, affine), modality, json.dumps(dict(intensity), sort_keys=True))

    def sound(self, about: SecondImages) -> Scan:
        """As a work folder would hold it.

        Raises:
            FibldmError: it is no sound image of this modality.
        """
        return (
            checked_second(self._as_read(), about)
            if isinstance(self.source, Volume)
            else read_second(self.source, about)
        )

    def _as_read(self) -> Scan:
        if isinstance(self.source, Volume):
            return Scan(self.source.array, self.source.affine, self.sha256)
        return read_scan(self.source)


@lru_cache(maxsize=_HELD)
def _on_grid(scan: AskedScan, place: tuple[Any, Any], modality: str, intensity: str) -> Tensor:
    shape, affine = place
    grid, about = (
        Grid(shape, np.array(affine).reshape(4, 4)),
        SecondImages(modality, Intensity.from_dict(json.loads(intensity))),
    )
    try:
        sound = scan.sound(about)
        image = Volume(sound.array, sound.affine)
        check_overlap(image.grid, grid)
    except FibldmError as error:
        raise FibldmError(f"image {scan.name}: {error.message}", error.remedy) from error
    return torch.from_numpy(on_grid(image, grid, about.intensity))
