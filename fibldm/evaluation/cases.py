"""The volumes that are measured: real cases of a work folder and synthetic ones, on the model grid of a run."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError, some_of
from fibldm.evaluation.dicom_volumes import as_nifti, series_in
from fibldm.files import atomic_path, hash_file, hash_value
from fibldm.progress import track
from fibldm.runs import load_facts
from fibldm.runs.stages import begun
from fibldm.synthesis.bundle import open_bundle
from fibldm.volumes.datalist import SPLITS, annotated_of, load_datalist, read_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.grid import Array, ModelGrid, Volume, resample
from fibldm.volumes.intensity import Intensity
from fibldm.volumes.masks import volumes_in
from fibldm.volumes.writer import volume_stem
from fibldm.workers import Engine, Processes, Work

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
        series: the DICOM series that the image was read from; None where there is none.
        annotated: the labels that were annotated in its mask, of which none is where that says unknown; None where all
            were, or nothing is known of the voxels that it leaves unknown.
    """

    name: str
    subject: str
    split: str | None
    image: Path
    label: Path | None
    series: Path | None = None
    annotated: tuple[int, ...] | None = None

    @property
    def written(self) -> Path:
        """What `fibldm synthesize` wrote, its sidecar beside it: the file, or the folder of the series."""
        return self.series or self.image


class Sample(NamedTuple):
    """A case on the model grid, axes in RAS+ order.

    Attributes:
        image: ``(X, Y, Z)``, or ``(C, X, Y, Z)`` of several channels, float32 in ``[-1, 1]``, -1 (air) where padded.
        labels: ``(X, Y, Z)``, uint8, unknown (255) where padded or without a mask.
        valid: ``(X, Y, Z)``, whether the voxel lies in the field of view.
        spacing: mm along R, A, S; the case's own where that is within 10 % of the model grid's.
        annotated: as `Case.annotated`.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    spacing: tuple[float, float, float]
    annotated: tuple[int, ...] | None = None

    def against(self, found: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Labels that were found, and the mask that says what they are compared with.

        Where not all labels were annotated, what the mask leaves unknown is none of those that were, so that one of
        these found there is wrong; the other labels are not compared.

        Args:
            found: ``(X, Y, Z)``.
        """
        if self.annotated is None:
            return found, self.labels
        compared = np.where(np.isin(found, self.annotated), found, 0).astype(np.uint8)
        outside = (self.labels == UNKNOWN_LABEL) & self.valid
        return compared, np.where(outside, 0, self.labels).astype(np.uint8)


@dataclass(frozen=True)
class Evaluated:
    """A run and the work folder it was trained on: what every measurement starts from.

    Attributes:
        run_dir: the run folder.
        work: the work folder.
        grid: the model grid.
        intensity: between files and ``[-1, 1]``.
        labels: names by label value, background included.
        channels: names of the image channels, in order.
        engine: computes features.
    """

    run_dir: Path
    work: Path
    grid: ModelGrid
    intensity: Intensity
    labels: dict[int, str]
    channels: tuple[str, ...] = ("image",)
    engine: Engine = Processes()
    _recent: "_Recent" = field(default_factory=lambda: _Recent(), compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "engine": Processes(), "_recent": _Recent()}  # for one worker of the engine

    @classmethod
    def open(cls, run_dir: str | Path, work: str | Path) -> "Evaluated":
        """A run whose latents are finished, and the work folder it was trained on.

        Raises:
            FibldmError: the run has no latents yet, or was trained on the data of another work folder.
        """
        return cls._of(load_facts(run_dir), run_dir, work, run_dir=run_dir)

    @classmethod
    def open_bundle(cls, bundle: str | Path, work: str | Path, *, out: str | Path, trust: bool = False) -> "Evaluated":
        """A bundle, and the work folder it was trained on; measurements go to ``out/evaluation``.

        Raises:
            FibldmError: it is no bundle of ``fibldm export``, changed since (unless trusted), or was trained on the
                data of another work folder, or ``out`` is a run, whose own figures lie there.
        """
        if stages := [kind.name for kind in begun(out)]:
            raise FibldmError(
                f"figures of a bundle need a folder of their own; {out} is a run with {', '.join(stages)}",
                "name another folder",
            )
        with open_bundle(bundle, trust=trust) as opened:
            return cls._of(opened.facts, bundle, work, run_dir=out)

    @classmethod
    def _of(
        cls, facts: Mapping[str, Any], trained: str | Path, work: str | Path, *, run_dir: str | Path
    ) -> "Evaluated":
        content = read_datalist(work)["content"]
        if facts["data"] != content:
            raise FibldmError(
                f"a run is measured on the data it was trained on; {trained} was trained on {facts['data'][:12]}, "
                f"{work} holds {content[:12]}",
                "give the work folder that this run was trained with",
            )
        return cls(
            Path(run_dir),
            Path(work),
            ModelGrid(tuple(facts["grid"]["spacing"]), tuple(facts["grid"]["size"])),
            Intensity.from_dict(facts["intensity"]),
            {int(value): str(name) for value, name in facts["labels"].items()},
            tuple(facts.get("channels", ("image",))),
        )

    @property
    def drawn(self) -> dict[str, Any]:
        """What tells whether the run draws volumes or masks, see `fibldm.volumes.label_images.channels_are_labels`."""
        return {"channels": self.channels, "labels": self.labels}

    @property
    def folder(self) -> Path:
        """Where measurements go."""
        return self.run_dir / "evaluation"

    def real(self, *splits: str) -> list[Case]:
        """The real cases with a mask of some splits, of all where none is named.

        Raises:
            FibldmError: no case of a split has a mask.
        """
        return [
            Case(
                entry["case"],
                str(entry["subject"]),
                split,
                Path(entry["image"]),
                Path(entry["label"]),
                annotated=annotated_of(entry),
            )
            for split in splits or SPLITS
            for entry in load_datalist(self.work, split, masks=True)
        ]

    def synthetic(self, folder: str | Path) -> list[Case]:
        """The volumes that ``fibldm synthesize`` wrote to a folder: ``<mask stem>_<k>.nii.gz``, ``masks/<mask stem>``.

        A mask named like a case of the work folder is that patient's; any other counts as a patient of its own. DICOM
        series are read from copies in NIfTI, which are made once.

        Raises:
            FibldmError: the folder holds no volume, one of them twice, or a series that cannot be read.
        """
        files, series = volumes_in(Path(folder)), series_in(Path(folder))
        if not files and not series:
            raise FibldmError(
                f"{folder} must hold synthetic volumes (.nii, .nii.gz, or folders of .dcm); it holds none",
                "check the path",
            )
        if twice := {volume_stem(file) for file in files} & {one.name for one in series}:
            raise FibldmError(
                f"every volume must be there once; {some_of(sorted(twice), 6)} came as NIfTI and as DICOM",
                "move one of them away",
            )
        known = {case.name: case for case in self.real()}
        return [_synthetic(file, known) for file in files] + [self._of_series(one, known) for one in series]

    def _of_series(self, series: Path, known: Mapping[str, Case]) -> Case:
        names = {value: name for value, name in self.labels.items() if value}
        copy = as_nifti(series, origin_of(series), names, self.folder / "cache" / "dicom")
        return replace(_synthetic(copy, known), series=series)

    def read(self, case: Case) -> Sample:
        """A case on the model grid, as training saw it; it is shared with whoever reads it again soon.

        Raises:
            FibldmError: a file cannot be read, holds other channels than the run has, or mask and volume do not lie on
                one grid.
        """
        return self._recent.get(case, self._read)

    def as_written(self, case: Case) -> Sample:
        """A synthetic volume on the model grid, in its units on disk; of MR, which `read` takes by its percentiles.

        Raises:
            FibldmError: see `read`.
        """
        return self._placed(case, lambda voxels: voxels)

    def _read(self, case: Case) -> Sample:
        return self._placed(case, self.intensity.normalise)

    def _placed(self, case: Case, change: Callable[[Array], Array]) -> Sample:
        """A case on the model grid, its voxels changed before."""
        channels = read_channels(case.image, len(self.channels))
        image = channels[0]
        grid = self.grid.training_grid(image.grid)
        changed = change(np.stack([channel.array for channel in channels]))
        moved = [resample(Volume(part, image.affine), grid, kind="image", fill=_AIR).array for part in changed]
        inside = Volume(np.ones(image.array.shape, dtype=np.uint8), image.affine)
        valid = resample(inside, grid, kind="label", fill=0).array.astype(bool)
        labels: Array = np.full(grid.shape, UNKNOWN_LABEL, dtype=np.uint8)
        if case.label is not None:
            mask = read_volume(str(case.label)).canonical()
            if mask.array.shape != image.array.shape or not np.allclose(mask.affine, image.affine, atol=1e-2):
                raise FibldmError(f"{case.image} must lie on the grid of its mask {case.label}; it does not")
            labels = resample(mask, grid, kind="label", fill=UNKNOWN_LABEL).array.astype(np.uint8)
        together = moved[0] if len(moved) == 1 else np.stack(moved)
        return Sample(together, labels, valid, grid.spacing, case.annotated)

    def key(self, case: Case) -> str:
        """SHA-256 of what `read` gives: the files' contents, the grid and the intensity."""
        files = [hash_file(path) for path in (case.image, case.label) if path is not None]
        return hash_value([files, self.grid.spacing, self.grid.size, self.intensity.to_dict()])


class _Recent:
    """The samples that were read last, as many as fit into some memory."""

    def __init__(self, at_most: int = 2**30) -> None:
        self.at_most, self.held = at_most, 0
        self.samples: OrderedDict[Case, Sample] = OrderedDict()

    def get(self, case: Case, read: Callable[[Case], Sample]) -> Sample:
        """A sample that was read before, or is read now."""
        if case not in self.samples:
            self.samples[case] = sample = read(case)
            self.held += _bytes(sample)
        self.samples.move_to_end(case)
        while self.held > self.at_most and len(self.samples) > 1:
            self.held -= _bytes(self.samples.popitem(last=False)[1])
        return self.samples[case]


def _bytes(sample: Sample) -> int:
    return sample.image.nbytes + sample.labels.nbytes + sample.valid.nbytes


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
        return self._get(self.evaluated.key(case), lambda: compute(self.evaluated.read(case)))

    def fill(self, cases: Sequence[Case], compute: Callable[[Sample], Array]) -> None:
        """Have the engine compute the arrays of several cases, where it is not this process.

        Args:
            cases: those that will be asked for.
            compute: can be sent to another process.
        """
        if self.evaluated.engine.here:
            return
        missing = [case for case in dict.fromkeys(cases) if not self._file(self.evaluated.key(case)).exists()]
        self.evaluated.folder.mkdir(parents=True, exist_ok=True)
        work = Work(_feature, _Given((self, compute)), f"computed {self.name}", self.evaluated.folder)
        items = [(case,) for case in missing]
        for _ in self.evaluated.engine.each(work, items, lambda places: track(places, self.name)):
            pass

    def get_pair(self, case: Case, other: Case, compute: Callable[[Sample, Sample], Array]) -> Array:
        """The same of two cases, in this order."""
        key = hash_value([self.evaluated.key(case), self.evaluated.key(other)])
        return self._get(key, lambda: compute(self.evaluated.read(case), self.evaluated.read(other)))

    def _get(self, key: str, compute: Callable[[], Array]) -> Array:
        file = self._file(key)
        if file.exists():
            stored: Array = np.load(file, allow_pickle=False)
            return stored
        computed = compute()
        with atomic_path(file) as temporary:
            np.save(temporary, computed, allow_pickle=False)
        return computed

    def _file(self, key: str) -> Path:
        return self.evaluated.folder / "cache" / f"{self.name}-{self.fingerprint[:16]}" / f"{key[:32]}.npy"


@dataclass(frozen=True)
class _Given:
    """A kit that comes as it is."""

    kit: tuple[FeatureCache, Callable[[Sample], Array]]

    def __call__(self) -> tuple[FeatureCache, Callable[[Sample], Array]]:
        return self.kit


def _feature(kit: tuple[FeatureCache, Callable[[Sample], Array]], case: Case) -> None:
    cache, compute = kit
    cache.get(case, compute)


def each_channel(image: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The channels ``(X, Y, Z)`` of an image ``(C, X, Y, Z)``, or the image itself where it has one only."""
    return list(image.reshape(-1, *image.shape[-3:]))


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


def read_channels(path: Path, count: int) -> list[Volume]:
    """The channels of an image file, axes in RAS+ order."""
    if count == 1:
        return [read_volume(str(path)).canonical()]
    scan = read_scan((path,))
    if scan.array.shape[3:] != (count,):
        raise FibldmError(f"{path} must hold {count} channels, as (X, Y, Z, C); its shape is {scan.array.shape}")
    return [Volume(scan.array[..., channel], scan.affine) for channel in range(count)]


def origin_of(file: Path) -> str:
    """The name of the mask that a synthetic volume was made from, by its own name."""
    name = volume_stem(file)
    stem, separator, number = name.rpartition("_")
    return stem if separator and number.isdigit() else name


def _synthetic(file: Path, known: Mapping[str, Case]) -> Case:
    name, origin = volume_stem(file), origin_of(file)
    mask = file.parent / "masks" / f"{origin}.nii.gz"
    patient = known.get(origin)
    return Case(
        name,
        patient.subject if patient else origin,
        patient.split if patient else None,
        file,
        mask if mask.exists() else None,
        annotated=patient.annotated if patient else None,
    )
