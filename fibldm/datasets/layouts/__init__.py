"""Find the images and masks of a dataset, however it is laid out.

* ``decathlon``, ``nnunet``: dataset.json
* ``bids`` (``bids_names``, ``bids_masks``): sub-XX/anat/ and derivatives/
* ``folders``: images/ and labels/
* ``tables``: a CSV or TSV manifest
* ``totalsegmentator``: a folder a case with binary masks
* ``dicom_tree`` (``dicom_links``, ``dicom_files``): DICOM studies
* ``packs``: one HDF5 file with many images

Shared: ``facts`` (the search that a layout is given, the description of what it found), ``entries`` (a volume file or
a folder of slices), ``walk`` (all files below a folder), ``binary_masks``, ``segments`` (masks with named segments).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from fibldm.datasets.layouts.bids import bids, is_bids
from fibldm.datasets.layouts.decathlon import decathlon
from fibldm.datasets.layouts.dicom_files import is_packed_dicom
from fibldm.datasets.layouts.entries import SIDECARS, is_dicom, visible
from fibldm.datasets.layouts.facts import Search
from fibldm.datasets.layouts.folders import folders
from fibldm.datasets.layouts.nnunet import is_nnunet, nnunet
from fibldm.datasets.layouts.packs import is_pack, pack
from fibldm.datasets.layouts.tables import manifests, table
from fibldm.datasets.layouts.totalsegmentator import is_organs, organs
from fibldm.datasets.layouts.walk import files_below
from fibldm.datasets.settings import PrepareSettings
from fibldm.datasets.source import Case, Source
from fibldm.errors import FibldmError, unknown_choice
from fibldm.volumes.formats.readers import SUPPORTED_SUFFIXES

LAYOUTS = ("auto", "decathlon", "nnunet", "bids", "folders", "csv", "dicom", "organs", "pack")
_LOOKED_FOR = {
    "decathlon": "a dataset.json with a training list",
    "nnunet": "a dataset.json with channel_names, or images called NAME_0000",
    "bids": "images such as sub-01/anat/sub-01_T1w.nii.gz",
    "folders": "the folders images/ and labels/",
    "csv": "a CSV or TSV with the columns image and label",
    "organs": "folders with ct.nii.gz or mri.nii.gz and segmentations/",
    "pack": "one HDF5 file with many images",
    "dicom": "DICOM files",
}
_SAMPLED = 200


def find_source(source: Path, settings: PrepareSettings) -> Source:
    """The cases of the dataset at ``source``, a folder or a CSV file.

    Args:
        source: where the dataset lies.
        settings: ``layout`` is one of `LAYOUTS`, of which ``auto`` takes the only one that fits; a layout may need to
            be told ``merge_masks``, ``channels`` or ``bids_mask``.

    Raises:
        FibldmError: unknown layout; none or several layouts fit; a setting is missing or not for this layout; files or
            entries are missing, unmatched, of no supported format or not unique (all of them listed); or a folder
            cannot be read.
    """
    if settings.layout not in LAYOUTS:
        raise unknown_choice("`layout`", settings.layout, LAYOUTS)
    search = Search(source, settings)
    try:
        if not source.exists():
            raise FibldmError(f"the source {source} must exist", "check the path")
        layout = detect_layout(search) if settings.layout == "auto" else settings.layout
        _check_settings(layout, settings)
        return _with_patients(_reader(layout)(search))
    except OSError as error:
        raise FibldmError(f"{source} must be readable; {error.strerror}", "check the permissions") from error


def detect_layout(search: Search) -> str:
    """The one layout that fits; DICOM only where no other does.

    Raises:
        FibldmError: none fits or several do.
    """
    found = [name for name, fits in _fitting(search).items() if fits]
    if not found and _holds_dicom(search.path):
        return "dicom"
    if len(found) == 1:
        return found[0]
    looked_for = ", ".join(f"{what} ({name})" for name, what in _LOOKED_FOR.items())
    raise FibldmError(
        f"{search.path} must follow one layout; {', '.join(found) if found else 'none'} fits. Looked for {looked_for}; "
        f"found {_content(search.path)}",
        f"choose with `layout` {'|'.join(found)}" if found else "arrange the files in one of these ways",
    )


def _fitting(search: Search) -> dict[str, bool]:
    source = search.path
    if source.is_file():
        return {"pack": True} if is_pack(source) else {"csv": True}
    from_nnunet = bool(search.facts) and is_nnunet(source, search.facts)
    return {
        "decathlon": "training" in search.facts and not from_nnunet,
        "nnunet": from_nnunet,
        "bids": is_bids(source),
        "folders": (source / "images").is_dir() and (source / "labels").is_dir(),
        "csv": bool(manifests(source)),
        "organs": is_organs(source),
    }


def _reader(layout: str) -> Callable[[Search], Source]:
    if layout == "dicom":
        from fibldm.datasets.layouts.dicom_tree import dicom_tree

        return dicom_tree
    return {
        "decathlon": decathlon,
        "nnunet": nnunet,
        "bids": bids,
        "folders": folders,
        "csv": table,
        "organs": organs,
        "pack": pack,
    }[layout]


def _with_patients(source: Source) -> Source:
    """Cases of DICOM series with the patient that their files name, where the dataset names none."""
    return replace(source, cases=tuple(_with_patient(case) for case in source.cases))


def _with_patient(case: Case) -> Case:
    first = case.images[0][0]
    if case.subject is not None or not is_dicom(first):
        return case
    from fibldm.volumes.dicom.series import find_series

    try:
        found = find_series([first])
    except FibldmError:  # a finding of this case, when it is read
        return case
    return replace(case, subject=found[0].patient_id or None) if found else case


def _check_settings(layout: str, settings: PrepareSettings) -> None:
    if settings.merge_masks and layout not in ("csv", "dicom", "folders", "organs"):
        message = f"`merge_masks` is for the layouts organs, csv, dicom and folders; the layout is {layout}"
        raise FibldmError(message, "leave it out")
    if settings.bids_mask is not None and layout != "bids":
        raise FibldmError(f"`bids_mask` is for the layout bids; the layout is {layout}", "leave it out")


def _holds_dicom(source: Path) -> bool:
    """Whether one of the first files is DICOM, if need be a compressed one."""
    files = (path for path in islice(files_below(source), _SAMPLED) if path.is_file())
    return any(is_packed_dicom(path) or is_dicom(path) for path in files)


def _content(source: Path) -> str:
    """What lies in a folder, without names, which may be patients'."""
    paths = visible(source)
    endings = Counter(_ending(path) for path in paths if path.is_file())
    files = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
    return f"{sum(path.is_dir() for path in paths)} folders and {sum(endings.values())} files ({files or 'none'})"


def _ending(path: Path) -> str:
    known = (*SUPPORTED_SUFFIXES, *SIDECARS)
    return next((suffix for suffix in known if path.name.lower().endswith(suffix)), "others")
