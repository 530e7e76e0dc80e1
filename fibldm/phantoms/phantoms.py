"""Procedural chest CT with pulmonary fibrosis: data to learn, test and demonstrate with, without network or patient.

A patient is a set of shapes in millimetres in the patient's own RAS+ coordinates (origin in the middle of the chest);
a scan renders them on a grid of its own, with its own inspiration, pose, noise and progress of the disease. Anatomy is
keyed by (seed, subject) and a scan by (seed, subject, session): a patient is the same whatever the number of patients.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json, write_text
from fibldm.phantoms.anatomy import count_sessions, draw_anatomy
from fibldm.phantoms.findings import Finding
from fibldm.phantoms.rendering import draw_scan, render
from fibldm.phantoms.table import fibrotic_share
from fibldm.progress import Bar, track
from fibldm.volumes.writer import write_nifti
from fibldm.workers import Processes, Work

LABELS: dict[int, str] = {
    0: "background",
    1: "right lung",
    2: "left lung",
    3: "airways",
    4: "ground glass",
    5: "reticulation",
    6: "honeycombing",
}
_FINEST, _COARSEST = 0.5, 20.0  # mm
FINDINGS = "findings.csv"
_GENERATOR = 1  # Count up whenever the same seed gives other voxels.


@dataclass(frozen=True)
class Phantom:
    """One synthetic chest CT.

    Attributes:
        volume: int16 HU, shape ``(X, Y, Z)`` of the stored orientation (not always RAS+), within [-1024, 3071].
        labels: uint8 of the same shape, values of ``LABELS``; vessels inside the lung belong to the lung.
        affine: voxel indices (centres) to RAS+ millimetres, 4x4.
        subject: ``sub-0001`` and so on.
        session: ``ses-1`` and so on, or None where the patient has one examination only.
        extent: fraction of the lung (airways left out) that is labelled fibrotic.
    """

    volume: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    subject: str
    session: str | None
    extent: float

    @property
    def name(self) -> str:
        """File name without suffix, such as ``sub-0012_ses-1``."""
        return self.subject if self.session is None else f"{self.subject}_{self.session}"


def make_phantom(
    seed: int,
    subject: int,
    session: int = 1,
    *,
    spacing: tuple[float, float, float] | None = None,
    orientation: str | None = None,
    finding: Finding | None = None,
) -> Phantom:
    """One examination of one patient.

    Args:
        seed: of the whole set of phantoms.
        subject: number of the patient, from 1.
        session: number of the examination, from 1; later ones show the disease progressed.
        spacing: millimetres along the patient's x, y, z; drawn around 5 where None.
        orientation: axis codes of the stored axes, such as ``"LPS"``; drawn where None.
        finding: what it shows; None is the patient's own disease.
    """
    anatomy = draw_anatomy(seed, subject)
    if finding is not None:
        disease = finding.applied(anatomy.fibrosis, np.random.default_rng([seed, subject, 0, 2]))
        anatomy = replace(anatomy, fibrosis=disease)
    rng = np.random.default_rng([seed, subject, session])
    scan = draw_scan(anatomy, rng, session=session, spacing=spacing, orientation=orientation)
    volume, labels = render(anatomy, scan, rng, session=session)
    return Phantom(
        volume=volume,
        labels=labels,
        affine=scan.affine,
        subject=f"sub-{subject:04d}",
        session=f"ses-{session}" if max(session, count_sessions(seed, subject)) > 1 else None,
        extent=fibrotic_share(labels),
    )


def write_phantoms(
    out: Path,
    *,
    subjects: int,
    seed: int,
    spacing: tuple[float, float, float] | None = None,
    findings: bool = False,
    progress: Bar | None = None,
    workers: int = 1,
) -> list[Path]:
    """Write phantoms as NIfTI: ``out/images``, ``out/labels`` (same names) and ``out/dataset.json``.

    An interrupted run goes on where it stopped: files are whole or absent, and ``dataset.json`` holds the recipe.

    Args:
        out: folder; made where absent.
        subjects: how many patients; about one in six has two examinations.
        seed: the same seed gives the same files.
        spacing: as of `make_phantom`.
        findings: whether patients have a written finding: fibrosis of a side, an extent and a pattern, with a sentence
            that says so in the column ``finding`` of ``out/findings.csv``, a table for ``fibldm prepare``.
        progress: wraps what is written, to show progress; a bar on standard error where None.
        workers: processes that write at the same time.

    Returns:
        The images, in the order of their names.

    Raises:
        FibldmError: ``subjects`` is below 1 or ``seed`` below 0, a spacing is none, ``out`` holds other images, or the
            disk is full.
    """
    if subjects < 1:
        raise FibldmError(f"subjects must be at least 1, got {subjects}", "ask for one patient or more")
    if seed < 0:
        raise FibldmError(f"seed must be 0 or more, got {seed}", "give another seed")
    if spacing is not None and not all(_FINEST <= step <= _COARSEST for step in spacing):
        raise FibldmError(
            f"spacing must be three numbers of {_FINEST:g} to {_COARSEST:g} mm, got {spacing}",
            "a chest CT has 0.6 to 5",
        )
    more = ({} if spacing is None else {"spacing": list(spacing)}) | ({"findings": True} if findings else {})
    _claim(Path(out), {"generator": _GENERATOR, "seed": seed, "subjects": subjects, **more})
    calls = [
        (Path(out), seed, subject, session if sessions > 1 else None, spacing, findings)
        for subject in range(1, subjects + 1)
        for sessions in [count_sessions(seed, subject)]
        for session in range(1, sessions + 1)
    ]
    bar = progress or partial(track, what="phantoms")
    images = list(Processes(workers).each(Work(_write_examination, what="drew a phantom"), calls, bar))
    if findings:
        _write_findings(Path(out), images, [(seed, subject) for _, seed, subject, *_ in calls])
    return images


def _claim(out: Path, recipe: dict[str, object]) -> None:
    """Write ``dataset.json`` first, so that no file ever lies in ``out`` without the recipe it was made with."""
    path, remedy = out / "dataset.json", "choose another folder, or delete this one"
    if path.exists():
        recorded = read_json(path).get("recipe")
        if recorded != recipe:
            raise FibldmError(f"{out} must hold phantoms made with {recipe}; {path.name} records {recorded}", remedy)
        return
    if any(out.glob("images/*")) or any(out.glob("labels/*")):
        raise FibldmError(f"{out} must be empty or hold phantoms, but has files and no {path.name}", remedy)
    write_json(
        path,
        {
            "name": "FibLDM phantoms",
            "description": "Procedural chest CT with pulmonary fibrosis; SYNTHETIC, made without any patient's data.",
            "modality": {"0": "CT"},
            "labels": {str(value): name for value, name in LABELS.items()},
            "licence": "CC0-1.0",
            "recipe": recipe,
        },
    )


def _write_examination(
    out: Path,
    seed: int,
    subject: int,
    session: int | None,
    spacing: tuple[float, float, float] | None,
    findings: bool,
) -> Path:
    """Write image and labels of one examination unless both are there; returns the image."""
    name = f"sub-{subject:04d}" + (f"_ses-{session}" if session else "") + ".nii.gz"
    image, labels = out / "images" / name, out / "labels" / name
    if not (image.exists() and labels.exists()):
        phantom = make_phantom(
            seed, subject, session or 1, spacing=spacing, finding=Finding.draw(seed, subject) if findings else None
        )
        for path, array in ((image, phantom.volume), (labels, phantom.labels)):
            write_nifti(path, array, phantom.affine, "SYNTHETIC phantom")
    return image


def _write_findings(out: Path, images: Sequence[Path], patients: Sequence[tuple[int, int]]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "label", "subject", "finding", "side", "extent", "pattern"])
    for image, (seed, subject) in zip(images, patients, strict=True):
        found = Finding.draw(seed, subject)
        files = (f"images/{image.name}", f"labels/{image.name}")
        said = (found.side or "no side", found.extent or "healthy", found.pattern or "no pattern")
        writer.writerow([*files, f"sub-{subject:04d}", found.sentence, *said])
    write_text(out / FINDINGS, table.getvalue())
