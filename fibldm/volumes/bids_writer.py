"""Written synthetic volumes as a BIDS derivative dataset: copies under BIDS names, each patient a hash."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibldm import __version__
from fibldm.errors import FibldmError, unknown_choice
from fibldm.files import atomic_path, hash_value, read_json, write_json, write_text
from fibldm.volumes.writer import sidecar

BIDS_VERSION = "1.10.0"
# CT has no place in BIDS yet (proposal BEP024): its files go by the proposal's name, and a .bidsignore says so
_CT = "ct"
SUFFIXES = ("T1w", "T2w", "PDw", "T2starw", "FLAIR", "inplaneT1", "inplaneT2", "angio", _CT)
"""How the kind of image may be named."""

_NOTICE = "synthetic; not a patient"
_SEGMENTATIONS = {
    "Description": "Label mask that the synthetic volumes beside it were drawn from; labels are named in dseg.tsv",
    "SpatialReference": "orig",
}
_README = f"""# Synthetic volumes by FibLDM {__version__}

No patient was imaged: every volume (`desc-synthetic`) was drawn from the label mask (`dseg`) of its subject by a
trained generator. A subject is a hash of one mask. A mask that was drawn on a real scan still carries the anatomy of
its patient.

`dseg.tsv` names the labels. The JSON file beside a volume says which generator, seed and settings gave it.
"""


def check_bids(suffix: str, *, modality: str, skull_stripped: bool | None) -> None:
    """See that volumes can be named and described, before they are made.

    Args:
        suffix: one of `SUFFIXES`.
        modality: "ct" or "mr"; BIDS has no suffix for others.
        skull_stripped: which BIDS asks of MR; ``None`` for CT.

    Raises:
        FibldmError: an unknown suffix, one of another modality, or MR of which it is not said.
    """
    if suffix not in SUFFIXES:
        raise unknown_choice("the BIDS suffix", suffix, SUFFIXES)
    if modality not in ("ct", "mr") or (suffix == _CT) != (modality == "ct"):
        raise FibldmError(f"the BIDS suffix must fit the modality of the run, {modality.upper()}; got {suffix}")
    if (suffix == _CT) != (skull_stripped is None):
        raise FibldmError(
            "BIDS asks of MR, and only of MR, whether it is skull-stripped",
            "give --skull-stripped or --no-skull-stripped with MR, neither with CT",
        )


def write_bids(
    folder: Path,
    volumes: Sequence[Path],
    *,
    suffix: str,
    names: Mapping[int, str],
    skull_stripped: bool | None = None,
) -> None:
    """Write the dataset; what lies there already under the same names is written again.

    Args:
        folder: of the dataset.
        volumes: ``OUT/<mask stem>_<k:03d>.nii.gz`` with their sidecars, masks in ``OUT/masks``.
        suffix: one of `SUFFIXES`; see `check_bids`.
        names: of the labels by value, without background.
        skull_stripped: see `check_bids`.

    Raises:
        FibldmError: a file cannot be read or written.
    """
    facts = [read_json(sidecar(volume)) for volume in volumes]
    write_json(folder / "dataset_description.json", _description(facts))
    rows = [(0, "background"), *sorted(names.items())]
    write_text(folder / "dseg.tsv", "".join(f"{index}\t{name}\n" for index, name in [("index", "name"), *rows]))
    write_json(folder / "dseg.json", _SEGMENTATIONS)
    write_text(folder / "README.md", _README)
    if suffix == _CT:
        write_text(folder / ".bidsignore", "**/ct\n")  # with a slash at its end, validators see the folder itself
    stated = {} if skull_stripped is None else {"SkullStripped": skull_stripped}
    for volume, fact in zip(volumes, facts, strict=True):
        _write_subject(folder, volume, suffix, {"Description": _NOTICE, **stated, **fact})


def _write_subject(folder: Path, volume: Path, suffix: str, facts: Mapping[str, Any]) -> None:
    subject = f"sub-{hash_value([facts['mask'], facts['mask_sha256']])[:12]}"
    place = folder / subject / (_CT if suffix == _CT else "anat")
    name = f"{subject}_run-{facts['number']:03d}_desc-synthetic_{suffix}"
    write_json(place / f"{name}.json", {key: value for key, value in facts.items() if key != "mask"})
    _copy(volume, place / f"{name}.nii.gz")
    mask = volume.name.removesuffix(f"_{facts['number']:03d}.nii.gz")
    _copy(volume.parent / "masks" / f"{mask}.nii.gz", place / f"{subject}_dseg.nii.gz")


def _description(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    licences = {fact["source"]["licence"] for fact in facts} - {None}
    described: dict[str, Any] = {
        "Name": "Synthetic volumes by FibLDM",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "FibLDM", "Version": __version__, "Description": "volumes that follow label masks"}],
    }
    return described | ({"License": licences.pop()} if len(licences) == 1 else {})


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
