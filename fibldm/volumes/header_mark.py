"""What the header of a file says of where its volume comes from."""

import json
from typing import Any

import nibabel

from fibldm.volumes.formats.readers import suffix_of
from fibldm.volumes.scan import Files

_WORD = b"SYNTHETIC"
_COMMENT = 6


def says_synthetic(files: Files) -> bool:
    """Whether the files of a volume say that it is synthetic, as those that FibLDM writes do.

    NIfTI by ``descrip`` or by a header extension, DICOM by Synthetic Data (0008,001C). Other formats have no place for
    it.

    Args:
        files: of one volume, as `fibldm.volumes.formats.readers.read_scan` has read them.
    """
    suffix = suffix_of(files[0])
    if suffix in (".nii", ".nii.gz"):
        header: Any = nibabel.load(files[0]).header
        return bytes(header["descrip"]).startswith(_WORD) or any(_says_so(part) for part in header.extensions)
    if suffix in (".dcm", ""):
        from fibldm.volumes.dicom.frames import read_dataset

        return str(getattr(read_dataset(files[0], ["SyntheticData"]), "SyntheticData", "")) == "YES"
    return False


def _says_so(extension: nibabel.nifti1.Nifti1Extension) -> bool:
    if extension.get_code() != _COMMENT:
        return False
    try:
        facts = json.loads(extension.get_content())
    except ValueError:
        return False
    return isinstance(facts, dict) and facts.get("synthetic") is True
