"""Find the images and masks of a dataset, however it is laid out.

* ``decathlon``, ``nnunet``: dataset.json
* ``bids`` (``bids_names``, ``bids_masks``): sub-XX/anat/ and derivatives/
* ``folders``: images/ and labels/
* ``tables``: a CSV or TSV manifest
* ``totalsegmentator``: a folder a case with binary masks
* ``dicom_tree`` (``dicom_links``, ``dicom_files``): DICOM studies
* ``packs``: one HDF5 file with many images

Shared: ``entries`` (a volume file or a folder of slices), ``walk`` (all files below a folder), ``binary_masks``,
``segments`` (masks whose segments have names), ``facts`` (the check of all cases and the description of the dataset).
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from fibldm.datasets.layouts.bids import bids, is_bids
from fibldm.datasets.layouts.decathlon import decathlon
from fibldm.datasets.layouts.dicom_files import is_packed_dicom
from fibldm.datasets.layouts.entries import SIDECARS, is_dicom, visible
from fibldm.datasets.layouts.facts import beside
from fibldm.datasets.layouts.folders import folders
from fibldm.datasets.layouts.nnunet import is_nnunet, nnunet
from fibldm.datasets.layouts.packs import is_pack, pack
from fibldm.datasets.layouts.tables import manifests, table
from fibldm.datasets.layouts.totalsegmentator import is_organs, organs
from fibldm.datasets.layouts.walk import files_below
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


@dataclass(frozen=True)
class LayoutOptions:
    """What a user may say about a dataset's layout.

    Attributes:
        merge_masks: names of binary masks, most important first; they become the values 1, 2, ...
        channels: endings of the images of a BIDS dataset to take; empty takes the only suffix there is.
        bids_mask: pattern of the mask files of a BIDS dataset; ``None`` takes the only kind there is.
        text: a key of the entries of a Decathlon dataset that is a text; columns of tables are read in any case.
    """

    merge_masks: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    bids_mask: str | None = None
    text: str | None = None


def find_source(source: Path, layout: str = "auto", *, options: LayoutOptions) -> Source:
    """The cases of the dataset at ``source``, a folder or a CSV file.

    Args:
        source: where the dataset lies.
        layout: one of `LAYOUTS`; ``auto`` takes the only one that fits.
        options: what the layout needs to be told.

    Raises:
        FibldmError: unknown layout; none or several layouts fit; an option is missing or not for this layout; files or
            entries are missing, unmatched, of no supported format or not unique (all of them listed); or a folder
            cannot be read.
    """
    if layout not in LAYOUTS:
        raise unknown_choice("layout", layout, LAYOUTS)
    try:
        if not source.exists():
            raise FibldmError(f"the source {source} must exist", "check the path")
        chosen = detect_layout(source) if layout == "auto" else layout
        _check_options(chosen, options)
        return _with_patients(_read(source, chosen, options))
    except OSError as error:
        raise FibldmError(f"{source} must be readable; {error.strerror}", "check the permissions") from error


def detect_layout(source: Path) -> str:
    """The one layout that fits ``source``; DICOM only where no other does.

    Raises:
        FibldmError: none fits or several do.
    """
    found = [name for name, fits in _fitting(source).items() if fits]
    if not found and _holds_dicom(source):
        return "dicom"
    if len(found) == 1:
        return found[0]
    looked_for = ", ".join(f"{what} ({name})" for name, what in _LOOKED_FOR.items())
    raise FibldmError(
        f"{source} must follow one layout; {', '.join(found) if found else 'none'} fits. Looked for {looked_for}; "
        f"found {_content(source)}",
        f"choose with --layout {'|'.join(found)}" if found else "arrange the files in one of these ways",
    )


def _fitting(source: Path) -> dict[str, bool]:
    if source.is_file():
        return {"pack": True} if is_pack(source) else {"csv": True}
    facts = beside(source)
    from_nnunet = bool(facts) and is_nnunet(source, facts)
    return {
        "decathlon": "training" in facts and not from_nnunet,
        "nnunet": from_nnunet,
        "bids": is_bids(source),
        "folders": (source / "images").is_dir() and (source / "labels").is_dir(),
        "csv": bool(manifests(source)),
        "organs": is_organs(source),
    }


def _read(source: Path, layout: str, options: LayoutOptions) -> Source:
    if layout == "dicom":
        from fibldm.datasets.layouts.dicom_tree import dicom_tree

        return dicom_tree(source, options.merge_masks)
    if layout == "bids":
        return bids(source, options.channels, options.bids_mask)
    if layout in ("csv", "organs", "folders"):
        return {"csv": table, "organs": organs, "folders": folders}[layout](source, options.merge_masks)
    if layout == "pack":
        return pack(source)
    return decathlon(source, options.text) if layout == "decathlon" else nnunet(source)


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


def _check_options(layout: str, options: LayoutOptions) -> None:
    if options.merge_masks and layout not in ("csv", "dicom", "folders", "organs"):
        message = f"--merge-masks is for the layouts organs, csv, dicom and folders; the layout is {layout}"
        raise FibldmError(message, "leave it out")
    if options.bids_mask is not None and layout != "bids":
        raise FibldmError(f"--bids-mask is for the layout bids; the layout is {layout}", "leave it out")


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
