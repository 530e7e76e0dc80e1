"""Work folders and synthetic volumes as ``torchio.SubjectsDataset``; files are read when a subject is taken.

The other way is `fibldm.datasets.torch_datasets.write_source`, which makes a source of ``fibldm prepare`` of one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.masks import mask_stem, volumes_in
from fibldm.volumes.writer import sidecar

if TYPE_CHECKING:
    import torchio

Transform = Callable[["torchio.Subject"], "torchio.Subject"]


def work_subjects(work: str | Path, split: str, transform: Transform | None = None) -> "torchio.SubjectsDataset":
    """The cases of one split of a work folder: ``image``, ``mask`` where there is one, and ``meta``, the case's entry.

    Volumes are as they lie in the folder, in HU or the data's own units; unlike a `WorkDataset`, not in ``[-1, 1]``.

    Args:
        work: the folder that ``fibldm prepare`` wrote.
        split: ``training``, ``validation`` or ``test``.
        transform: of TorchIO.

    Raises:
        FibldmError: unknown split, no case in it, or the folder holds no datalist.
    """
    entries = load_datalist(work, split)
    if not entries:
        raise FibldmError(f"a data set needs at least one case; {work} has none in its split {split}")
    return _dataset([(entry["image"], entry.get("label"), entry) for entry in entries], transform)


def synthetic_subjects(folder: str | Path, transform: Transform | None = None) -> "torchio.SubjectsDataset":
    """The volumes that ``fibldm synthesize`` wrote to a folder: ``image``, ``mask`` and ``meta``, the sidecar.

    Args:
        folder: of volumes, sidecars and ``masks/``.
        transform: of TorchIO.

    Raises:
        FibldmError: the folder holds no volume, or a volume lacks its sidecar or its mask.
    """
    files = volumes_in(Path(folder))
    if not files:
        raise FibldmError(f"{folder} must hold synthetic volumes (.nii, .nii.gz); it holds none", "check the path")
    return _dataset([_synthetic(file) for file in files], transform)


def _synthetic(file: Path) -> tuple[str, str | None, dict[str, Any]]:
    facts = read_json(sidecar(file))
    if facts.get("mask") is None:
        return str(file), None, facts
    mask = file.parent / "masks" / f"{mask_stem(Path(facts['mask']))}.nii.gz"
    if not mask.is_file():
        raise FibldmError(f"{file.name} must lie beside its mask masks/{mask.name}; it is missing", "put it back")
    return str(file), str(mask), facts


def _dataset(
    parts: list[tuple[str, str | None, dict[str, Any]]], transform: Transform | None
) -> "torchio.SubjectsDataset":
    import torchio

    subjects = []
    for image, mask, facts in parts:
        images: dict[str, Any] = {"image": torchio.ScalarImage(image)}
        if mask is not None:
            images["mask"] = torchio.LabelMap(mask)
        subjects.append(torchio.Subject({**images, "meta": facts}))
    return torchio.SubjectsDataset(subjects, transform=transform)
