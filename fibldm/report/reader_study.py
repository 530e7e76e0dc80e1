"""Can people tell synthetic volumes from real scans? A folder of both under random numbers, and a key beside it.

Nothing in the folder tells the one from the other: all volumes are cut to the same range of intensities, rounded to the
same type and written with the same header. Which of them are synthetic says the key alone, which lies outside.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fibldm.errors import FibldmError
from fibldm.files import atomic_folder, hash_file, write_text
from fibldm.report.subject import Subject, open_subject
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.readers import read_scan
from fibldm.volumes.intensity import Intensity, load_intensity
from fibldm.volumes.masks import volumes_in
from fibldm.volumes.writer import volume_stem, write_nifti

_LEVELS = 255
_DESCRIPTION = "READER STUDY: real or SYNTHETIC, see the key"
_HEADS = ("number", "kind", "source", "source_sha256", "volume_sha256")

_README = """\
# Reader study

{count} volumes, some of them scans of patients, others SYNTHETIC and of nobody. Which are which is told by
{key}, which lies beside this folder and must not be given to readers.

- `volumes/<number>.nii.gz`: numbers are drawn at random. All are cut to one range of intensities, rounded to whole
  numbers from 0 to {levels}, laid on RAS+ axes with their corner at 0, and have the same header.
- `answers.csv`: one row for each volume, to be filled in by a reader: `real` or `synthetic`, and how sure from 1 to 5.

Real volumes are patient data: handle this folder as you handle the scans. No synthetic volume is of a patient of whom a
real scan is here. Do not take volumes out of this folder: outside of it nothing says which of them are synthetic.
"""


@dataclass(frozen=True)
class Study:
    """What was written: numbers of volumes, and the file of the key."""

    real: int
    synthetic: int
    key: Path


@dataclass(frozen=True)
class _Volume:
    kind: str
    case: str
    file: Path


def write_reader_study(
    source: Path, out: Path, *, synthetic: Path | None, data: Path | None, seed: int, trust: bool = False
) -> Study:
    """Write a folder of as many real scans of test patients as synthetic volumes of masks of other patients.

    Args:
        source: run, bundle or evaluation that the volumes are of.
        out: the folder, absent or empty; the key is ``<out>.key.csv`` beside it.
        synthetic: output of ``fibldm synthesize``.
        data: the work folder; None takes that of the run.
        seed: of the numbers and of the choice.
        trust: take a bundle that changed since its export.

    Raises:
        FibldmError: volumes or work folder are missing, there are too few of either, or something lies there already.
    """
    key = out.with_name(f"{out.name}.key.csv")
    for path in (out, key):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FibldmError(f"a reader study is written anew; {path} lies there already", "choose another folder")
    if synthetic is None:
        raise FibldmError("a reader study needs synthetic volumes; none were given", "give `synthetic`")
    subject = open_subject(source, data=data, trust=trust)
    if subject.work is None:
        raise FibldmError(f"a reader study needs real scans, and {subject.work_missing}", "give `data`")
    generator = np.random.default_rng(seed)
    chosen = _chosen(synthetic, load_datalist(subject.work.folder, "test"), generator)
    intensity = _intensity(subject)
    numbers = generator.permutation(len(chosen)) + 1
    digits = len(str(len(chosen)))
    rows = []
    with atomic_folder(out) as folder:
        for number, volume in sorted(zip(numbers, chosen, strict=True), key=lambda pair: int(pair[0])):
            name = f"{number:0{digits}d}"
            file = folder / "volumes" / f"{name}.nii.gz"
            file.parent.mkdir(exist_ok=True)
            _write(file, volume.file, intensity)
            rows.append((name, volume.kind, volume.file.name, hash_file(volume.file), hash_file(file)))
        answers = [(name, "", "") for name, *_ in rows]
        write_text(folder / "answers.csv", _csv(("number", "real_or_synthetic", "sure_1_to_5"), answers))
        write_text(folder / "README.md", _README.format(count=len(rows), key=key.name, levels=_LEVELS))
        write_text(key, _csv(_HEADS, rows))
        key.chmod(0o600)
    kinds = [volume.kind for volume in chosen]
    return Study(kinds.count("real"), kinds.count("synthetic"), key)


def _chosen(folder: Path, cases: Sequence[Mapping[str, Any]], generator: np.random.Generator) -> list[_Volume]:
    """Half of the test patients with their scans, and synthetic volumes that are of none of these."""
    files = volumes_in(folder)
    subject_of = {case["case"]: case["subject"] for case in cases}
    patients = sorted(set(subject_of.values()))
    real_patients = set(generator.permutation(patients)[: max(1, len(patients) // 2)])
    real = [_Volume("real", case["case"], Path(case["image"])) for case in cases if case["subject"] in real_patients]
    made = [
        _Volume("synthetic", volume_stem(file), file)
        for file in files
        if subject_of.get(volume_stem(file).rpartition("_")[0]) not in real_patients
    ]
    count = min(len(real), len(made))
    if not count:
        raise FibldmError(
            "a reader study needs scans of test patients, and volumes of masks of other ones; "
            f"there are {len(real)} and {len(made)}",
            "draw volumes of the masks of all test patients",
        )
    return [part[place] for part in (real, made) for place in sorted(generator.permutation(len(part))[:count])]


def _intensity(subject: Subject) -> Intensity:
    known = subject.facts.get("intensity")
    if known:
        return Intensity.from_dict(known)
    assert subject.work is not None
    return load_intensity(subject.work.folder / "intensity.json")


def _write(path: Path, file: Path, intensity: Intensity) -> None:
    """A volume as any other of the study."""
    scan = read_scan((file,))
    channels = scan.array[None] if scan.array.ndim == 3 else np.moveaxis(scan.array, 3, 0)
    levels = np.rint((intensity.normalise(channels) + 1) / 2 * _LEVELS).astype(np.int16)
    array: NDArray[np.int16] = levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, 3)
    affine = np.diag([*nibabel.affines.voxel_sizes(scan.affine), 1.0])
    write_nifti(path, array, affine, _DESCRIPTION)


def _csv(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return text.getvalue()
