"""MONAI's door to MetaImage and NRRD, which MONAI itself reads only with further packages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.data.utils import is_supported_format
from monai.transforms.io.array import SUPPORTED_READERS
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from fibldm.errors import FibldmError
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.scan import Scan


class FibldmReader(ImageReader):
    """`LoadImage(reader="FibldmReader")`: the array and affine of `read_scan`, RAS+, channels last.

    Importing this module registers it; any format with a geometry is read when it is asked for by name, and ``.mha``,
    ``.mhd``, ``.nrrd`` and ``.nhdr`` also without.

    Args:
        resample_tilt: whether DICOM slices under a tilted gantry, or unevenly spaced, are brought to a regular grid.
        suv: whether PET in DICOM is brought to SUV by body weight.
    """

    def __init__(self, resample_tilt: bool = False, suv: bool = False) -> None:
        super().__init__()
        self.resample_tilt, self.suv = resample_tilt, suv

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether MONAI may choose this reader by itself."""
        return is_supported_format(filename, ["mha", "mhd", "nrrd", "nhdr"])

    def read(self, data: Sequence[PathLike] | PathLike, **_: Any) -> Scan:
        """One image from its files."""
        files = tuple(Path(str(file)) for file in ensure_tuple(data))
        return read_scan(files, resample_tilt=self.resample_tilt, suv=self.suv)

    def get_data(self, img: Scan) -> tuple[np.ndarray, dict[str, Any]]:
        """Array and metadata, in MONAI's words."""
        if not isinstance(img, Scan):
            raise FibldmError(f"FibldmReader gives data of a Scan only; got {type(img).__name__}")
        return img.array, {
            MetaKeys.AFFINE: img.affine,
            MetaKeys.ORIGINAL_AFFINE: img.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(img.array.shape[:3]),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if img.array.ndim == 3 else -1,
        }


SUPPORTED_READERS["fibldmreader"] = FibldmReader
