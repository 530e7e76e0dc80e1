"""The mask of a case from its files, whatever the format."""

from dataclasses import replace

from fibldm.datasets.source import Mask
from fibldm.errors import FibldmError
from fibldm.volumes.formats.readers import ITK, Spacing, read_scan, suffix_of
from fibldm.volumes.formats.segment_nrrd import named_segments
from fibldm.volumes.label_values import settled
from fibldm.volumes.scan import Remark, Scan

NEARLY: Remark = (
    "warning",
    "labels are nearly whole numbers and were rounded: the file was saved with a scale; save labels as integers",
)


def read_mask(mask: Mask, image: Scan, *, spacing: Spacing | None = None, scanner: bool = True) -> Scan:
    """A mask as its files hold it, in RAS+ order; `Mask.value` of a binary mask is left to whoever merges them.

    Args:
        mask: its files; with names, a DICOM segmentation or RT structure set, or a segmentation of 3D Slicer.
        image: what it belongs to; a mask with names that covers a part of its grid is padded to all of it.
        spacing: as in `read_scan`, as is ``scanner``.
        scanner: see there.

    Raises:
        FibldmError: as in `read_scan`, or the mask has several channels.
    """
    if mask.names and suffix_of(mask.files[0]) not in ITK:
        return _dicom_mask(mask, image)
    scan = read_scan(mask.files, spacing=spacing, key="label", item=mask.item, scanner=scanner)
    if mask.names:
        from fibldm.volumes.dicom.masks import on_grid_of

        return on_grid_of(named_segments(scan, mask.files[0], mask.names, elsewhere=mask.elsewhere), image)
    if scan.array.ndim != 3:
        raise FibldmError(
            f"a mask must be one label map (X, Y, Z); {mask.files[0].name} has {scan.array.shape[3]} channels",
            "merge them into one label map",
        )
    array, changed = settled(scan.array)
    return replace(scan, array=array, findings=(*scan.findings, NEARLY)) if changed else scan


def _dicom_mask(mask: Mask, image: Scan) -> Scan:
    from fibldm.volumes.dicom.masks import on_grid_of, read_segmentation, read_structures
    from fibldm.volumes.dicom.series import find_series

    kinds = {series.modality for series in find_series(mask.files)}
    if len(mask.files) != 1 or kinds not in ({"SEG"}, {"RTSTRUCT"}):
        raise FibldmError("a DICOM mask must be one file, a segmentation or an RT structure set", "name one of them")
    file = mask.files[0]
    read = read_segmentation if kinds == {"SEG"} else read_structures
    return on_grid_of(read(file, mask.names, image, elsewhere=mask.elsewhere), image)
