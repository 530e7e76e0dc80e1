"""Files of any format that FibLDM reads, what their headers say, and what their voxels do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.datasets.layouts.entries import entry_files, volume_entries
from fibldm.evaluation.recognition.recognition import Recognition, recognise
from fibldm.models.mark import PUBLIC_KEY
from fibldm.volumes.dicom.series import find_series
from fibldm.volumes.formats.readers import WITHOUT_GEOMETRY, read_scan, suffix_of
from fibldm.volumes.header_mark import says_synthetic
from fibldm.volumes.scan import Files

_SLICES = ("", ".dcm", ".png")


@dataclass(frozen=True)
class Recognised:
    """What is known of one volume.

    Attributes:
        name: of its file or folder, as it was found.
        header: whether the header says that it is synthetic.
        public: what the voxels say by the public key.
        site: what they say by the key of a site, where one was given.
    """

    name: str
    header: bool
    public: Recognition
    site: Recognition | None = None

    @property
    def synthetic(self) -> bool:
        """Whether the voxels have the mark of one of the keys."""
        return self.public.synthetic or (self.site is not None and self.site.synthetic)

    @property
    def described(self) -> str:
        """In a line."""
        own = [] if self.site is None else [f"key of this site: {self.site.described}"]
        header = "header: synthetic" if self.header else "header says nothing of it"
        return f"{self.name}: {'; '.join([self.public.described, *own, header])}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {"file": self.name, "synthetic": self.synthetic, **self.public.to_dict(), "header": self.header}
        return found if self.site is None else {**found, "site": self.site.to_dict()}


def volumes_at(path: Path) -> list[tuple[str, Files]]:
    """The volume of a file, or those of a folder: the files in it, and all series of DICOM in and below it.

    Raises:
        FibldmError: there is none, or none of a supported format.
    """
    if not path.is_dir():
        return [(str(path), entry_files(path))]
    files = [entry for entry in volume_entries(path) if entry.is_file() and suffix_of(entry) not in _SLICES]
    others = [file for file in path.rglob("[!.]*") if file.is_file() and suffix_of(file) in ("", ".dcm")]
    series = [part.files for part in find_series(others) if part.image]
    found = [(str(file), (file,)) for file in files] + [(str(part[0].parent), part) for part in series]
    return found or [(str(path), entry_files(path))]


def recognise_file(name: str, files: Files, *, site_key: str | None = None) -> Recognised:
    """What voxels and header of a volume say.

    Args:
        name: how it is called.
        files: of it, see `volumes_at`.
        site_key: looked for beside the public one.

    Raises:
        FibldmError: it cannot be read.
    """
    spacing = (1.0, 1.0, 1.0) if suffix_of(files[0]) in WITHOUT_GEOMETRY else None
    scan = read_scan(files, spacing=spacing, scanner=False)
    array = scan.array if scan.array.ndim == 4 else scan.array[..., None]
    channels = [np.asarray(part, dtype=np.float32) for part in np.moveaxis(array, -1, 0)]
    x, y, z = (float(step) for step in scan.spacing)
    stated = None if spacing else (x, y, z)
    public = recognise(channels, stated, PUBLIC_KEY)
    site = None if site_key is None else recognise(channels, stated, site_key)
    return Recognised(name, says_synthetic(files), public, site)
