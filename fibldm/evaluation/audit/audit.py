"""An audit of synthetic volumes against the scans that their generator learned from, and others that it never saw."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fibldm.errors import FibldmError
from fibldm.evaluation.audit.calibration import FEWEST, Calibration, Share, closer_to_training
from fibldm.evaluation.audit.matching import Match, Matcher, Transform, Turn, turned_back
from fibldm.evaluation.audit.membership import denoising_error, told_apart
from fibldm.evaluation.statistics import by_patient, mean_estimate
from fibldm.files import hash_file, hash_value, read_json, write_json
from fibldm.progress import track
from fibldm.synthesis import Synthesizer
from fibldm.volumes.datalist import load_datalist
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.masks import volumes_in
from fibldm.volumes.pictures import Pair, write_comparison
from fibldm.volumes.writer import volume_stem

NO_EVIDENCE = "no evidence of copying at this threshold"
NOT_POSSIBLE = "audit not possible"
MEMBERSHIP_NOT_MEASURED = "membership not measured: no weights were given"

FEWEST_TRAINING = 2
METHOD = 1
"""Of the similarities; another number looks all volumes up anew."""

_PICTURED = 6
_KEPT_EVERY = 10  # volumes


@dataclass(frozen=True)
class Scan:
    """A volume of one of the three sets.

    Attributes:
        name: its file's, without the suffix.
        subject: its patient.
        file: NIfTI.
        mask: NIfTI of its labels; None where there are none.
    """

    name: str
    subject: str
    file: Path
    mask: Path | None = None


def scans_of_folder(folder: Path, what: str) -> list[Scan]:
    """The NIfTI files of a folder, each of a patient of its own.

    Raises:
        FibldmError: there is none.
    """
    files = volumes_in(folder)
    if not files:
        raise FibldmError(f"{folder} must hold {what} (.nii, .nii.gz); it holds none", "check the path")
    return [Scan(volume_stem(file), volume_stem(file), file) for file in files]


def scans_of_work(work: Path, *splits: str) -> list[Scan]:
    """The scans of some splits of a work folder.

    Raises:
        FibldmError: it is no work folder.
    """
    entries = [entry for split in splits for entry in load_datalist(work, split)]
    return [
        Scan(
            str(entry["case"]),
            str(entry["subject"]),
            Path(entry["image"]),
            Path(entry["label"]) if entry.get("label") else None,
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
) -> dict[str, Any]:
    """Look synthetic volumes up among training scans, beside scans that were held out; `out` keeps what was found.

    Args:
        training: what the generator learned from.
        held_out: of other patients, from the same scanners; the threshold comes from one half of them.
        synthetic: to be audited.
        out: gets ``audit.json``, ``closest.png`` and ``matches.json``, with which an audit goes on.
        synthesizer: the generator, of one channel; None leaves out whether its weights tell the training scans.

    Returns:
        What ``audit.json`` holds.

    Raises:
        FibldmError: a set has too few volumes, two sets share a file, or a file cannot be read or is constant.
    """
    _check(training, held_out, synthetic)
    facts = {"training_scans": len(training), "held_out_scans": len(held_out), "synthetic_volumes": len(synthetic)}
    patients = len({scan.subject for scan in held_out})
    if patients < FEWEST:
        why = f"{NOT_POSSIBLE}: scans of at least {FEWEST} patients must be held out; there are {patients}"
        result: dict[str, Any] = {
            "verdict": why,
            "copy_rate": None,
            "membership": MEMBERSHIP_NOT_MEASURED,
            "facts": facts,
        }
        write_json(out / "audit.json", result)
        return result
    matcher = Matcher([_varying(scan.file) for scan in track(training, "training scans")])
    found = _Found.beside(out / "matches.json", matcher, training)
    matches = {scan.file: found.match(scan) for scan in track([*held_out, *synthetic], "closest training scans")}
    found.keep()
    similarities = {scan.name: matches[scan.file].similarity for scan in held_out}
    calibration = Calibration.of(similarities, {scan.name: scan.subject for scan in held_out})
    ordered = sorted(synthetic, key=lambda scan: (-matches[scan.file].similarity, scan.name))
    copies = [scan for scan in ordered if matches[scan.file].similarity > calibration.threshold]
    _write_pictures(out / "closest.png", matcher, training, ordered[:_PICTURED], matches)
    result = {
        "verdict": _verdict(len(copies), len(synthetic)),
        "threshold": calibration.threshold,
        "copy_rate": Share(len(copies), len(synthetic)).to_dict(),
        "held_out_named": calibration.false.to_dict(),
        "copies": [_entry(scan, matches[scan.file], training) for scan in copies],
        "memorised_patients": sorted({training[matches[scan.file].scan].subject for scan in copies}),
        "membership": _membership(synthesizer, training, held_out),
        "own_masks": _own_masks(matcher, training, held_out, synthetic),
        "figures": _neighbours(matcher, held_out, synthetic),
        "closest": [_entry(scan, matches[scan.file], training) for scan in ordered],
        "held_out": [_entry(scan, matches[scan.file], training) for scan in held_out],
        "facts": {**facts, "calibrated_on": len(calibration.calibrated_on), "voxel_mm": matcher.spacing},
    }
    write_json(out / "audit.json", result)
    return result


def _varying(file: Path) -> Volume:
    volume = read_volume(file)
    if volume.array.min() == volume.array.max():
        raise FibldmError(f"{file}: a training scan must not be constant", "leave it out")
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
            own[scan.name] = denoising_error(synthesizer, read_volume(scan.file), mask, scan.name)
        grouped = by_patient([scan.subject for scan in scans], [own[scan.name] for scan in scans])
        errors.append([float(np.mean(values)) for values in grouped.values()])
    return told_apart(*errors)


def _own_masks(
    matcher: Matcher, training: Sequence[Scan], held_out: Sequence[Scan], synthetic: Sequence[Scan]
) -> dict[str, Any] | str:
    """Is a volume drawn from a training mask more like its patient's scan than one from a held-out mask is?

    A mask alone gives anatomy away; what the generator remembers beyond that shows in the difference.
    """
    similar = []
    for scans in (training, held_out):
        by_name = {scan.name: scan for scan in scans}
        pairs = [(by_name[name], scan) for scan in synthetic if (name := scan.name.rsplit("_", 1)[0]) in by_name]
        own = [
            -matcher.similarity(*(read_volume(one.file) for one in pair)) for pair in track(pairs, "scans of own masks")
        ]
        similar.append([float(np.mean(v)) for v in by_patient([real.subject for real, _ in pairs], own).values()])
    if min(map(len, similar)) < 2:
        return "not measured: there must be volumes of the masks of at least two training and two held-out patients"
    told = told_apart(*similar)
    return {**told, "mean_of_training": -float(np.mean(similar[0])), "mean_of_held_out": -float(np.mean(similar[1]))}


def _check(training: Sequence[Scan], held_out: Sequence[Scan], synthetic: Sequence[Scan]) -> None:
    if len(training) < FEWEST_TRAINING or not synthetic:
        raise FibldmError(
            f"an audit needs at least {FEWEST_TRAINING} training scans and one synthetic volume; "
            f"got {len(training)} and {len(synthetic)}"
        )
    known: dict[str, str] = {}
    for what, scans in (("training", training), ("held out", held_out), ("synthetic", synthetic)):
        for scan in scans:
            content = hash_file(scan.file)
            if what == "held out" and known.get(content) == "training":
                raise FibldmError(
                    f"scans must be of training or held out; {scan.file.name} is both", "give each in one folder only"
                )
            known.setdefault(content, what)


class _Found:
    """The matches of volumes by the hash of their files, kept in a file."""

    def __init__(self, file: Path, matcher: Matcher, key: str, matches: dict[str, Any]) -> None:
        self.file, self.matcher, self.key, self.matches = file, matcher, key, matches

    @classmethod
    def beside(cls, file: Path, matcher: Matcher, training: Sequence[Scan]) -> "_Found":
        key = hash_value([METHOD, matcher.spacing, [hash_file(scan.file) for scan in training]])
        kept = read_json(file) if file.exists() else {}
        return cls(file, matcher, key, kept["matches"] if kept.get("training") == key else {})

    def match(self, scan: Scan) -> Match:
        content = hash_file(scan.file)
        if content not in self.matches:
            try:
                match = self.matcher.match(read_volume(scan.file))
            except FibldmError as error:
                raise FibldmError(f"{scan.file}: {error.message}", error.remedy) from error
            self.matches[content] = [match.scan, match.similarity, *match.transform]
            if len(self.matches) % _KEPT_EVERY == 0:
                self.keep()
        index, similarity, (axes, signs), scale, shift, inverted = self.matches[content]
        return Match(index, similarity, Transform(Turn(tuple(axes), tuple(signs)), scale, tuple(shift), inverted))

    def keep(self) -> None:
        write_json(self.file, {"training": self.key, "matches": self.matches})


def _verdict(copies: int, volumes: int) -> str:
    return f"{copies} of {volumes} volumes are copies of training scans" if copies else NO_EVIDENCE


def _entry(scan: Scan, match: Match, training: Sequence[Scan]) -> dict[str, Any]:
    found = training[match.scan]
    return {
        "synthetic": scan.file.name,
        "train": found.file.name,
        "score": match.similarity,
        "transform": str(match.transform),
    }


def _neighbours(matcher: Matcher, held_out: Sequence[Scan], synthetic: Sequence[Scan]) -> dict[str, Any]:
    """In both feature spaces, as volumes lie: authenticity, and whether they are closer to training scans."""
    others = matcher.features_of([read_volume(scan.file) for scan in held_out])
    made = matcher.features_of([read_volume(scan.file) for scan in track(synthetic, "neighbours")])
    figures = {}
    for name, training, other, own in zip(("spectrum", "shape"), matcher.features, others, made, strict=True):
        to_training, to_others = own @ training.T, own @ other.T
        among = training @ training.T
        np.fill_diagonal(among, -1)
        authentic = to_training.max(axis=1) <= among.max(axis=1)[to_training.argmax(axis=1)]
        closer = [closer_to_training(*pair) for pair in zip(to_training, to_others, strict=True)]
        subjects = [scan.subject for scan in synthetic]
        for figure, values in (("authenticity", authentic), ("closer_to_training", closer)):
            measured = by_patient(subjects, [float(value) for value in values])
            figures[f"{figure}/{name}"] = mean_estimate(measured).to_dict()
    return figures


def _write_pictures(
    file: Path, matcher: Matcher, training: Sequence[Scan], scans: Iterable[Scan], matches: Mapping[Path, Match]
) -> None:
    pairs = []
    for scan in scans:
        index, similarity, transform = matches[scan.file]
        made = turned_back(matcher.prepare(read_volume(scan.file), transform.scale), transform, matcher.spacing)
        title = f"{training[index].name} and {scan.name}: similarity {similarity:.3f}"
        real = matcher.training[index].grey
        spacing = (matcher.spacing,) * 3
        pairs.append(Pair(title, 2 * real - 1, 2 * made - 1, spacing, ("training", "synthetic, laid upon it")))
    write_comparison(file, pairs)
