"""Masks in; edited masks out, each with a file beside it that says what was done."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.errors import FibldmError
from fibldm.files import hash_value, read_json, write_json
from fibldm.locks import alone
from fibldm.mask_editing.anatomy import Anatomy
from fibldm.mask_editing.words import read_edits
from fibldm.progress import track
from fibldm.volumes.grid import Volume, turned_like
from fibldm.volumes.masks import as_labels, find_masks, hash_mask, mask_stem, read_mask
from fibldm.volumes.writer import sidecar, write_labels
from fibldm.workers import Processes, Work, cores

LOCK = ".edit-masks.lock"


def edit_masks(
    masks: Iterable[Path | str],
    out: Path | str,
    *,
    work: Path | str,
    edits: Sequence[str],
    count: int = 1,
    seed: int = 0,
    allow_extrapolation: bool = False,
    workers: int | None = None,
    anatomy: Anatomy | None = None,
) -> list[Path]:
    """Write edited masks: ``out/<mask>_<number:03d>.nii.gz``, each with a JSON file of what was done beside it.

    Args:
        masks: files and folders of label maps, with the label values of ``work``.
        out: folder; made where absent.
        work: work folder of ``fibldm prepare``, whose training masks say what may lie where, and how large.
        edits: one after the other, as `fibldm.mask_editing.words.EDITS` writes them.
        count: edited masks of each; they differ where an edit draws.
        seed: of what is drawn, with the name of the mask and the number.
        allow_extrapolation: whether sizes outside of the training masks are taken; the JSON file says so.
        workers: processes that read and edit; None is one a core.
        anatomy: what the training masks say, where that is known already; None reads them.

    Returns:
        The files, in the order of masks.

    Raises:
        FibldmError: a mask cannot be read, an edit cannot be read or done on a mask, what comes out lies outside of
            training, another file lies there, or another process writes to ``out``. Masks before it stay written.
    """
    parsed = read_edits(edits)
    if count < 1 or seed < 0:
        raise FibldmError(f"count must be at least 1 and seed at least 0; got {count} and {seed}")
    files = find_masks([Path(mask) for mask in masks])
    processes = cores() if workers is None else workers
    anatomy = anatomy or Anatomy.of_training(work, workers=processes)
    calls = [
        (file, number, Path(out), anatomy, list(edits), seed, allow_extrapolation)
        for file in files
        for number in range(count)
    ]
    del parsed  # read again where they are done: what is sent to a process is words
    with alone(Path(out) / LOCK, str(out), "wait until that has ended, or choose another --out"):
        bar = partial(track, what="edit")
        return list(Processes(processes).each(Work(_edited, what="edited a mask", folder=Path(out)), calls, bar))


def _edited(
    file: Path, number: int, out: Path, anatomy: Anatomy, edits: list[str], seed: int, allow_extrapolation: bool
) -> Path:
    name = mask_stem(file)
    path = out / f"{name}_{number:03d}.nii.gz"
    facts: dict[str, Any] = {"mask": file.name, "mask_sha256": hash_mask(file), "edits": edits, "seed": seed}
    facts["request"] = hash_value([*facts.values(), number, sorted(anatomy.names.items()), repr(anatomy)])
    if path.exists():
        if not sidecar(path).exists() or read_json(sidecar(path)).get("request") != facts["request"]:
            raise FibldmError(f"{path} lies there already and is another mask", "choose another --out folder")
        return path
    stored = as_labels(read_mask(file, anatomy.names))
    mask = stored.canonical()
    if strange := sorted(set(np.unique(mask.array).tolist()) - {*anatomy.names, 255}):
        raise FibldmError(
            f"{file.name} must hold labels of the training masks ({anatomy.listed(frozenset(anatomy.names))}); "
            f"it holds {', '.join(map(str, strange))}",
            "give it the label values of the work folder",
        )
    edited, done = _done(mask, anatomy, edits, [seed, number, *name.encode()], file.name)
    found = anatomy.envelope.check(edited, allow=True)
    if found and not allow_extrapolation:
        raise FibldmError(
            f"{file.name} would lie outside of what the training masks cover; {'; '.join(found)}",
            "ask for less, or give --allow-extrapolation to go on anyway",
        )
    write_json(sidecar(path), {**facts, "number": number, "done": done, "outside_of_training": found})
    write_labels(path, turned_like(edited, stored.grid))
    return path


def _done(
    mask: Volume, anatomy: Anatomy, edits: list[str], key: list[int], name: str
) -> tuple[Volume, list[dict[str, Any]]]:
    done = []
    for index, (text, edit) in enumerate(zip(edits, read_edits(edits), strict=True)):
        try:
            labels, what = edit(mask, anatomy, np.random.default_rng([*key, index]))
        except FibldmError as error:
            raise FibldmError(f"{name}: {text}: {error.message}", error.remedy) from error
        mask = replace(mask, array=labels)
        done.append({"edit": text, **what})
    return mask, done
