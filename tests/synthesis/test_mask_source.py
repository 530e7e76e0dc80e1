"""Mask files are read, hashed and placed once for all their volumes, in bounded memory."""

from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from fibldm.errors import FibldmError
from fibldm.models.conditions.covariates import CovariateEncoding
from fibldm.synthesis import (
    Job,
    MaskSource,
    Output,
    OutputConflict,
    SamplingSettings,
    Synthesis,
    SynthesisSettings,
    jobs_of,
)
from fibldm.synthesis import mask_source as module
from fibldm.synthesis.mask_source import RecentMasks
from fibldm.synthesis.request import PreparedMask, SynthesisRequest
from fibldm.volumes.masks import hash_mask

NAMES = {1: "lung"}


class Generator:
    """What `Output` asks of a synthesizer, without networks: volumes are their masks."""

    names = NAMES
    source = {"weights": "these"}
    beside = {"covariates": CovariateEncoding({})}
    conditions: dict[str, Any] = {}

    def __init__(self) -> None:
        self.prepared: list[str] = []

    def prepare(self, request: SynthesisRequest, *, allow_extrapolation: bool) -> PreparedMask:
        self.prepared.append(request.name)
        assert request.mask is not None
        if not request.mask.array.any():
            raise FibldmError(f"{request.name}: no voxel has a label")
        return PreparedMask(request, request.mask.canonical(), request.mask.grid, {}, [])

    def checks(self, check: int | None, reject_copies: object) -> list[Any]:
        return []

    def tiles(self, prepared: PreparedMask, settings: SamplingSettings) -> None:
        return None

    def as_trained(self, settings: SamplingSettings) -> SamplingSettings:
        return settings

    def mark_of(self, settings: SamplingSettings) -> dict[str, Any]:
        return {"voxels": False, "why": "they are their masks"}

    def attempt(self, prepared: list[PreparedMask], *, settings: object, **_: object) -> list[Synthesis]:
        masks = [part.request.mask for part in prepared]
        return [Synthesis((mask,), {"number": part.request.number}) for mask, part in zip(masks, prepared, strict=True)]  # type: ignore[arg-type]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each mask was read and hashed."""
    counted: Counter[str] = Counter()

    def counting(name: str) -> None:
        whole = getattr(module, name)

        def call(file: Path, *given: Any) -> Any:
            counted[f"{name} {file.name.partition('.')[0]}"] += 1
            return whole(file, *given)

        monkeypatch.setattr(module, name, call)

    counting("read_mask")
    counting("hash_mask")
    return counted


def write(path: Path, value: int = 1) -> Path:
    array = np.zeros((4, 5, 6), dtype=np.uint8)
    array[1:3, 2] = value
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-2.0, 3, 4, 1])), path)
    return path


def output(folder: Path, *, limit: int | None = None) -> tuple[Output, Generator]:
    generator = Generator()
    made = Output(generator, folder, SynthesisSettings())  # type: ignore[arg-type]
    if limit is not None:
        made._recent.limit = limit
    return made, generator


def make(made: Output, jobs: list[Job], batch: int = 1) -> list[Path]:
    missing = made.missing(jobs)
    for start in range(0, len(missing), batch):
        made.write(missing[start : start + batch])
    return [made.path(job) for job in jobs]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_mask_is_read_hashed_and_prepared_once_for_all_its_volumes(
    tmp_path: Path, calls: Counter[str], batch: int
) -> None:
    """Also where some of them lie there already, and where all do."""
    files = [write(tmp_path / f"{name}.nii.gz") for name in "ab"]
    once = {f"{what} {name}": 1 for what in ("read_mask", "hash_mask") for name in "ab"}
    for count, names in ((2, ["a", "b"]), (4, ["a", "b"]), (4, [])):
        made, generator = output(tmp_path / "out")
        calls.clear()
        written = make(made, jobs_of(files, NAMES, count), batch)
        assert calls == once and generator.prepared == names
    assert [path.name for path in written] == [f"{name}_00{number}.nii.gz" for name in "ab" for number in range(4)]
    assert made.write(jobs_of(files[:1], NAMES, 4)) == written[:4]


def test_of_many_masks_the_last_ones_stay_in_memory_and_the_others_are_read_twice(
    tmp_path: Path, calls: Counter[str]
) -> None:
    """Once to look at all, before anything is written, and once to draw from; never more than the limit at a time."""
    files = [write(tmp_path / f"{name}.nii.gz") for name in "abcde"]
    jobs = jobs_of(files, NAMES, 3)
    masks = list(dict.fromkeys(job.mask for job in jobs if job.mask is not None))
    made, generator = output(tmp_path / "out", limit=2 * 4 * 5 * 6)
    missing = made.missing(jobs)
    assert [mask.nbytes > 0 for mask in masks] == [False, False, False, True, True] and len(made._prepared) == 2
    for job in missing:
        made.write([job])
        assert sum(mask.nbytes > 0 for mask in masks) == 2 == len(made._prepared)
    assert all(calls[f"read_mask {name}"] == 2 for name in "abcde") and generator.prepared == [*"abcde", *"abcde"]
    calls.clear()
    again, _ = output(tmp_path / "out", limit=0)
    make(again, jobs)
    assert max(calls.values()) == 1, "a mask whose volumes are all there is looked at once"


def test_the_masks_used_last_are_held(tmp_path: Path) -> None:
    masks = [MaskSource(write(tmp_path / f"{name}.nii.gz"), NAMES) for name in "abc"]
    recent = RecentMasks(2 * masks[0].labels.array.nbytes)
    one, two, three = masks
    assert two.labels is two.labels and three.labels is not None
    assert [recent.use(mask) for mask in (one, two, one, three)] == [[], [], [], [two]]
    assert [mask.nbytes for mask in masks] == [120, 0, 120]
    assert RecentMasks(0).use(one) == [] and one.nbytes == 120, "one is held in any case"


def test_a_mask_that_changes_between_the_look_at_it_and_its_turn_is_refused(tmp_path: Path) -> None:
    """Its sidecar would tell the hash of another mask; one that is held is not looked at again."""
    mask = MaskSource(write(tmp_path / "a.nii.gz"), NAMES)
    before, labels = hash_mask(mask.file), mask.labels
    write(mask.file, value=2)
    assert mask.labels is labels and mask.sha256 == before
    mask.release()
    with pytest.raises(FibldmError, match="must stay as it is while volumes are made of it; .*a.nii.gz was changed"):
        _ = mask.labels
    write(mask.file)
    np.testing.assert_array_equal(mask.labels.array, labels.array)


def test_of_masks_that_are_refused_all_are_told_and_nothing_is_made(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.nii.gz", value=value) for name, value in (("a", 1), ("b", 0), ("c", 0))]
    nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), 0.5, np.float32), np.eye(4)), tmp_path / "d.nii.gz")
    made, _ = output(tmp_path / "out")
    jobs = jobs_of([*files, tmp_path / "d.nii.gz"], NAMES, 2)
    with pytest.raises(FibldmError, match="3 of 4 masks are refused, nothing was made:\n  b: .*\n  c: .*\n  d: a mask"):
        made.missing(jobs)
    assert not (tmp_path / "out").exists()
    made.write(jobs[:2])
    other = jobs_of([write(tmp_path / "a.nii.gz", value=2)], NAMES, 2)
    with pytest.raises(OutputConflict, match="made from another mask, run or settings"):
        output(tmp_path / "out")[0].missing(other)
