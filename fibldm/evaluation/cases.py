"""The volumes that are measured: real cases of a work folder and synthetic ones, on the model grid of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import atomic_path, hash_file, hash_value
from fibldm.runs import load_facts
from fibldm.synthesis import volumes_in
from fibldm.volumes.datalist import SPLITS, load_datalist, read_datalist
from fibldm.volumes.grid import Array, ModelGrid, Volume, read_volume, resample
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.writer import volume_stem

_AIR = -1.0


@dataclass(frozen=True)
class Case:
    """One volume to measure, as it lies on disk.

    Attributes:
        name: of the volume.
        subject: its patient; of a synthetic volume, the patient whose mask it was made from.
        split: "training", "validation" or "test"; None where the patient is not in the work folder.
        image: NIfTI file.
        label: NIfTI file of its mask; None for a synthetic volume without one.
    """

    name: str
    subject: str
    split: str | None
    image: Path
    label: Path | None


class Sample(NamedTuple):
    """A case on the model grid, axes in RAS+ order.

    Attributes:
        image: ``(X, Y, Z)``, float32 in ``[-1, 1]``, air where padded.
        labels: ``(X, Y, Z)``, uint8, unknown (255) where padded or without a mask.
        valid: ``(X, Y, Z)``, whether the voxel lies in the field of view.
        spacing: mm along R, A, S; the case's own where that is within 10 % of the model grid's.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class Evaluated:
    """A run and the work folder it was trained on: what every measurement starts from.

    Attributes:
        run_dir: the run folder.
        work: the work folder.
        grid: the model grid.
        intensity: between files and ``[-1, 1]``.
        labels: names by label value, background included.
    """

    run_dir: Path
    work: Path
    grid: ModelGrid
    intensity: Intensity
    labels: dict[int, str]

    @classmethod
    def open(cls, run_dir: str | Path, work: str | Path) -> "Evaluated":
        """A run whose latents are finished, and the work folder it was trained on.

        Raises:
            FibldmError: the run has no latents yet, or was trained on the data of another work folder.
        """
        facts, content = load_facts(run_dir), read_datalist(work)["content"]
        if facts["data"] != content:
            raise FibldmError(
                f"a run is measured on the data it was trained on; {run_dir} was trained on {facts['data'][:12]}, "
                f"{work} holds {content[:12]}",
                "give the work folder that this run was trained with",
            )
        return cls(
            Path(run_dir),
            Path(work),
            ModelGrid(tuple(facts["grid"]["spacing"]), tuple(facts["grid"]["size"])),
            Intensity.from_dict(facts["intensity"]),
            {int(value): str(name) for value, name in facts["labels"].items()},
        )

    @property
    def folder(self) -> Path:
        """Where measurements go."""
        return self.run_dir / "evaluation"

    def real(self, *splits: str) -> list[Case]:
        """The real cases of some splits, of all where none is named."""
        return [
            Case(entry["case"], str(entry["subject"]), split, Path(entry["image"]), Path(entry["label"]))
            for split in splits or SPLITS
            for entry in load_datalist(self.work, split)
        ]

    def synthetic(self, folder: str | Path) -> list[Case]:
        """The volumes that ``fibldm synthesize`` wrote to a folder: ``<mask stem>_<k>.nii.gz``, ``masks/<mask stem>``.

        A mask named like a case of the work folder is that patient's; any other counts as a patient of its own.

        Raises:
            FibldmError: the folder holds no volume.
        """
        files = volumes_in(Path(folder))
        if not files:
            raise FibldmError(f"{folder} must hold synthetic volumes (.nii, .nii.gz); it holds none", "check the path")
        known = {case.name: case for case in self.real()}
        return [_synthetic(file, known) for file in files]

    def read(self, case: Case) -> Sample:
        """A case on the model grid, as training saw it.

        Raises:
            FibldmError: a file cannot be read, or mask and volume do not lie on one grid.
        """
        image = read_volume(str(case.image)).canonical()
        grid = self.grid.training_grid(image.grid)
        normalised = Volume(self.intensity.normalise(image.array), image.affine)
        inside = Volume(np.ones(image.array.shape, dtype=np.uint8), image.affine)
        valid = resample(inside, grid, kind="label", fill=0).array.astype(bool)
        labels: Array = np.full(grid.shape, UNKNOWN_LABEL, dtype=np.uint8)
        if case.label is not None:
            mask = read_volume(str(case.label)).canonical()
            if mask.array.shape != image.array.shape or not np.allclose(mask.affine, image.affine, atol=1e-2):
                raise FibldmError(f"{case.image} must lie on the grid of its mask {case.label}; it does not")
            labels = resample(mask, grid, kind="label", fill=UNKNOWN_LABEL).array.astype(np.uint8)
        return Sample(resample(normalised, grid, kind="image", fill=_AIR).array, labels, valid, grid.spacing)

    def key(self, case: Case) -> str:
        """SHA-256 of what `read` gives: the files' contents, the grid and the intensity."""
        files = [hash_file(path) for path in (case.image, case.label) if path is not None]
        return hash_value([files, self.grid.spacing, self.grid.size, self.intensity.to_dict()])


@dataclass(frozen=True)
class FeatureCache:
    """Arrays of cases, computed once for each content: ``RUN/evaluation/cache/<name>-<hash>/<case key>.npy``.

    Attributes:
        evaluated: where the cases come from.
        name: of what is computed.
        fingerprint: of what computes it; another one shares nothing with this cache.
    """

    evaluated: Evaluated
    name: str
    fingerprint: str

    def get(self, case: Case, compute: Callable[[Sample], Array]) -> Array:
        """The array of a case, from disk where this content was seen before."""
        folder = self.evaluated.folder / "cache" / f"{self.name}-{self.fingerprint[:16]}"
        file = folder / f"{self.evaluated.key(case)[:32]}.npy"
        if file.exists():
            stored: Array = np.load(file, allow_pickle=False)
            return stored
        computed = compute(self.evaluated.read(case))
        with atomic_path(file) as temporary:
            np.save(temporary, computed, allow_pickle=False)
        return computed


def need_masks(cases: list[Case], what: str) -> None:
    """Refuse cases without masks.

    Raises:
        FibldmError: names them.
    """
    missing = [case.name for case in cases if case.label is None]
    if missing:
        raise FibldmError(
            f"{what} needs the mask of every volume; {', '.join(missing[:6])} came without",
            "put them into the folder masks/ beside the volumes, named as the volumes are without their _000",
        )


def _synthetic(file: Path, known: dict[str, Case]) -> Case:
    name = volume_stem(file)
    stem, separator, number = name.rpartition("_")
    origin = stem if separator and number.isdigit() else name
    mask = file.parent / "masks" / f"{origin}.nii.gz"
    patient = known.get(origin)
    return Case(
        name,
        patient.subject if patient else origin,
        patient.split if patient else None,
        file,
        mask if mask.exists() else None,
    )
