"""An audit of synthetic volumes against the scans that their generator learned from, and others that it never saw."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.errors import FibldmError
from fibldm.evaluation.audit.calibration import FEWEST, Calibration, Share, closer_to_training
from fibldm.evaluation.audit.lookup import Lookup, Scan, Seen
from fibldm.evaluation.audit.membership import denoising_error, told_apart
from fibldm.evaluation.statistics import by_patient, mean_estimate
from fibldm.files import hash_file, write_json
from fibldm.progress import track
from fibldm.synthesis import Synthesizer
from fibldm.volumes.datalist import load_datalist, read_datalist
from fibldm.volumes.detail import cube_spacing
from fibldm.volumes.formats.nifti import read_grid, read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.known_scans import AUDIT, TRAINING
from fibldm.volumes.masks import volumes_in
from fibldm.volumes.matching import METHOD, Matcher, turned_back
from fibldm.volumes.pictures import Pair, write_comparison
from fibldm.volumes.writer import volume_stem
from fibldm.workers import Engine, Processes

NO_EVIDENCE = "no evidence of copying at this threshold"
NOT_POSSIBLE = "audit not possible"
MEMBERSHIP_NOT_MEASURED = "membership not measured: no weights were given"

FEWEST_TRAINING = 2

_PICTURED = 6


def scans_of_folder(folder: Path, what: str, channels: int = 1) -> list[Scan]:
    """The NIfTI files of a folder, each of a patient of its own.

    Raises:
        FibldmError: there is none.
    """
    files = volumes_in(folder)
    if not files:
        raise FibldmError(f"{folder} must hold {what} (.nii, .nii.gz); it holds none", "check the path")
    return [Scan(volume_stem(file), volume_stem(file), file, channels=channels) for file in files]


def scans_of_work(work: Path, *splits: str) -> list[Scan]:
    """The scans of some splits of a work folder.

    Raises:
        FibldmError: it is no work folder.
    """
    channels = len(read_datalist(work)["channels"])
    entries = [entry for split in splits for entry in load_datalist(work, split)]
    return [
        Scan(
            str(entry["case"]),
            str(entry["subject"]),
            Path(entry["image"]),
            Path(entry["label"]) if entry.get("label") else None,
            channels,
        )
        for entry in entries
    ]


def audit(
    training: Sequence[Scan],
    held_out: Sequence[Scan],
    synthetic: Sequence[Scan],
    out: Path,
    *,
    synthesizer: Synthesizer | None = None,
    data: str | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Look synthetic volumes up among training scans, beside scans that were held out; `out` keeps what was found.

    Each volume is read once, and once more those few that are drawn, and those that the weights are asked about.

    Args:
        training: what the generator learned from.
        held_out: of other patients, from the same scanners; the threshold comes from one half of them.
        synthetic: to be audited.
        out: gets ``audit.json``, ``closest.png``, ``training.npz`` (training scans as they are compared, see
            `fibldm.volumes.known_scans`) and ``matches.json``, with which an audit goes on.
        synthesizer: the generator, of one channel; None leaves out whether its weights tell the training scans.
        data: fingerprint of the dataset whose training cases ``training`` are; None where they came as a folder.
        engine: looks volumes up; None is this process.

    Returns:
        What ``audit.json`` holds.

    Raises:
        FibldmError: a set has too few volumes, two sets share a file, a file cannot be read or is constant, or the
            generator was trained on other data.
    """
    contents = _check(training, held_out, synthetic)
    of = {"data": data, "weights": None if synthesizer is None else str(synthesizer.source["weights"])}
    _check_data(synthesizer, data)
    facts = {"training_scans": len(training), "held_out_scans": len(held_out), "synthetic_volumes": len(synthetic)}
    patients = len({scan.subject for scan in held_out})
    if patients < FEWEST:
        why = f"{NOT_POSSIBLE}: scans of at least {FEWEST} patients must be held out; there are {patients}"
        result: dict[str, Any] = {
            "verdict": why,
            "copy_rate": None,
            "membership": MEMBERSHIP_NOT_MEASURED,
            "of": of,
            "facts": facts,
        }
        write_json(out / AUDIT, result)
        return result
    spacing = cube_spacing([read_grid(scan.file) for scan in training])
    matcher = Matcher.of((_varying(scan) for scan in track(training, "training scans")), spacing)
    matcher.write(out / TRAINING)
    lookup = Lookup(out / "matches.json", matcher, contents)
    lookup.fill([*held_out, *synthetic], engine or Processes(), out / TRAINING)
    seen = _see(lookup, training, held_out, synthetic)
    similarities = {scan.name: seen[scan.file].match.similarity for scan in held_out}
    calibration = Calibration.of(similarities, {scan.name: scan.subject for scan in held_out})
    ordered = sorted(synthetic, key=lambda scan: (-seen[scan.file].match.similarity, scan.name))
    copies = [scan for scan in ordered if seen[scan.file].match.similarity > calibration.threshold]
    _write_pictures(out / "closest.png", matcher, training, ordered[:_PICTURED], seen)
    result = {
        "verdict": _verdict(len(copies), len(synthetic)),
        "threshold": calibration.threshold,
        "copy_rate": Share(len(copies), len(synthetic)).to_dict(),
        "held_out_named": calibration.false.to_dict(),
        "copies": [_entry(scan, seen, training) for scan in copies],
        "memorised_patients": sorted({training[seen[scan.file].match.scan].subject for scan in copies}),
        "membership": _membership(synthesizer, training, held_out),
        "own_masks": _own_masks(training, held_out, synthetic, seen),
        "figures": _neighbours(matcher, held_out, synthetic, seen),
        "closest": [_entry(scan, seen, training) for scan in ordered],
        "held_out": [_entry(scan, seen, training) for scan in held_out],
        "of": of,
        "facts": {
            **facts,
            "calibrated_on": len(calibration.calibrated_on),
            "voxel_mm": spacing,
            "method": METHOD,
            "scans": matcher.fingerprint,
        },
    }
    write_json(out / AUDIT, result)
    return result


def _varying(scan: Scan) -> Volume:
    volume = scan.volume()
    if volume.array.min() == volume.array.max():
        raise FibldmError(f"{scan.file}: a training scan must not be constant", "leave it out")
    return volume


def _membership(
    synthesizer: Synthesizer | None, training: Sequence[Scan], held_out: Sequence[Scan]
) -> dict[str, Any] | str:
    """How well the weights tell training scans from held-out ones, each patient's mean; or why that is not measured."""
    if synthesizer is None:
        return MEMBERSHIP_NOT_MEASURED
    if not synthesizer.network.sees_mask or len(synthesizer.channels) > 1:
        return "membership not measured: that needs a generator that sees masks, of one channel"
    errors = []
    for what, scans in (("training", training), ("held-out", held_out)):
        own = {}
        for scan in track(scans, f"denoising {what} scans"):
            mask = None if scan.mask is None else read_volume(scan.mask)
            own[scan.name] = denoising_error(synthesizer, scan.volume(), mask, scan.name)
        grouped = by_patient([scan.subject for scan in scans], [own[scan.name] for scan in scans])
        errors.append([float(np.mean(values)) for values in grouped.values()])
    return told_apart(*errors)


def _see(
    lookup: Lookup, training: Sequence[Scan], held_out: Sequence[Scan], synthetic: Sequence[Scan]
) -> dict[Path, Seen]:
    """What is looked up of held-out scans and of synthetic volumes, these beside the scans of their own masks."""
    scans = {scan.name: one for scan, one in zip(training, lookup.matcher.training, strict=True)}
    seen: dict[Path, Seen] = {}
    for place, scan in enumerate(track([*held_out, *synthetic], "closest training scans")):
        is_real = place < len(held_out)
        seen[scan.file], prepared = lookup.see(scan, None if is_real else scans.get(_mask_of(scan)))
        if is_real:
            scans[scan.name] = prepared
    lookup.keep()
    return seen


def _own_masks(
    training: Sequence[Scan], held_out: Sequence[Scan], synthetic: Sequence[Scan], seen: Mapping[Path, Seen]
) -> dict[str, Any] | str:
    """Is a volume drawn from a training mask more like its patient's scan than one from a held-out mask is?

    A mask alone gives anatomy away; what the generator remembers beyond that shows in the difference.
    """
    similar, both = [], {scan.name for scan in training} & {scan.name for scan in held_out}
    for scans in (training, held_out):
        subjects = {scan.name: scan.subject for scan in scans if scan.name not in both}
        own = [(subjects[name], scan) for scan in synthetic if (name := _mask_of(scan)) in subjects]
        values = [-float(seen[scan.file].own or 0) for _, scan in own]
        similar.append([float(np.mean(v)) for v in by_patient([subject for subject, _ in own], values).values()])
    if min(map(len, similar)) < 2:
        return "not measured: there must be volumes of the masks of at least two training and two held-out patients"
    told = told_apart(*similar)
    return {**told, "mean_of_training": -float(np.mean(similar[0])), "mean_of_held_out": -float(np.mean(similar[1]))}


def _mask_of(synthetic: Scan) -> str:
    return synthetic.name.rsplit("_", 1)[0]


def _check(training: Sequence[Scan], held_out: Sequence[Scan], synthetic: Sequence[Scan]) -> dict[Path, str]:
    """SHA-256 of all files."""
    if len(training) < FEWEST_TRAINING or not synthetic:
        raise FibldmError(
            f"an audit needs at least {FEWEST_TRAINING} training scans and one synthetic volume; "
            f"got {len(training)} and {len(synthetic)}"
        )
    contents = {scan.file: hash_file(scan.file) for scan in (*training, *held_out, *synthetic)}
    known = {contents[scan.file] for scan in training}
    for scan in held_out:
        if contents[scan.file] in known:
            raise FibldmError(
                f"scans must be of training or held out; {scan.file.name} is both", "give each in one folder only"
            )
    return contents


def _check_data(synthesizer: Synthesizer | None, data: str | None) -> None:
    """Refuse weights that were trained on other data, whose training scans nobody would have looked at."""
    trained_on = None if synthesizer is None else synthesizer.data
    if None not in (trained_on, data) and trained_on != data:
        raise FibldmError(
            f"weights are audited on the data that they were trained on, {trained_on:.12}; these are {data:.12}",
            "give the work folder that they were trained with",
        )


def _verdict(copies: int, volumes: int) -> str:
    return f"{copies} of {volumes} volumes are copies of training scans" if copies else NO_EVIDENCE


def _entry(scan: Scan, seen: Mapping[Path, Seen], training: Sequence[Scan]) -> dict[str, Any]:
    match = seen[scan.file].match
    return {
        "synthetic": scan.file.name,
        "train": training[match.scan].file.name,
        "score": match.similarity,
        "transform": str(match.transform),
    }


def _neighbours(
    matcher: Matcher, held_out: Sequence[Scan], synthetic: Sequence[Scan], seen: Mapping[Path, Seen]
) -> dict[str, Any]:
    """In both feature spaces, as volumes lie: authenticity, and whether they are closer to training scans."""
    figures = {}
    subjects = [scan.subject for scan in synthetic]
    for part, (name, training) in enumerate(zip(("spectrum", "shape"), matcher.features, strict=True)):
        other, own = (np.stack([seen[scan.file].features[part] for scan in scans]) for scans in (held_out, synthetic))
        to_training, to_others = own @ training.T, own @ other.T
        among = training @ training.T
        np.fill_diagonal(among, -1)
        authentic = to_training.max(axis=1) <= among.max(axis=1)[to_training.argmax(axis=1)]
        closer = [closer_to_training(*pair) for pair in zip(to_training, to_others, strict=True)]
        for figure, values in (("authenticity", authentic), ("closer_to_training", closer)):
            measured = by_patient(subjects, [float(value) for value in values])
            figures[f"{figure}/{name}"] = mean_estimate(measured).to_dict()
    return figures


def _write_pictures(
    file: Path, matcher: Matcher, training: Sequence[Scan], scans: Iterable[Scan], seen: Mapping[Path, Seen]
) -> None:
    pairs = []
    for scan in scans:
        index, similarity, transform = seen[scan.file].match
        grey = matcher.open(scan.volume()).grey(transform.scale)
        made = turned_back(grey, transform, matcher.spacing)
        real = matcher.open(training[index].volume()).grey()
        title = f"{training[index].name} and {scan.name}: similarity {similarity:.3f}"
        spacing = (matcher.spacing,) * 3
        pairs.append(Pair(title, 2 * real - 1, 2 * made - 1, spacing, ("training", "synthetic, laid upon it")))
    write_comparison(file, pairs)
