"""Masks that arrive in a folder become synthetic series, unattended: a service for a research pipeline.

    python scripts/watch_folder.py --bundle BUNDLE --inbox INBOX --outbox OUTBOX

An item is a mask (NIfTI, NRRD, MetaImage, DICOM segmentation) or a folder of such. It is taken once it stood still for
an interval, by renaming it, so that several watchers may share an inbox. Volumes come to OUTBOX/synthetic/ITEM, all at
once; the item goes to OUTBOX/done/ITEM, or to OUTBOX/refused/ITEM with the reason in OUTBOX/refused/ITEM.json. What a
killed watcher had in hand is finished by the next one.

What is known of a patient beside the mask, such as age and sex, may lie in an item that is a folder, as
``covariates.json``: {"age": 63, "sex": "F"}; what is asked of further conditions of the bundle, by their names, as
``conditions.json``. Both are of all masks of the item, and go before ``--covariate`` and ``--condition``. What is not
given is unknown. A scan that is asked for as a condition lies in the item: {"image": "mr.nii.gz"}.

Names of files may tell patients: ITEM is the beginning of a SHA-256 of the content, as are the names of its volumes.
Exit code 0 after SIGTERM, 130 after SIGINT, 2 where it cannot begin.
"""

import argparse
import errno
import fcntl
import json
import logging
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fibldm.cli.output import emit_error, log_to_standard_error
from fibldm.cli.synthesis_options import read_named, read_strengths
from fibldm.errors import FibldmError, sentence
from fibldm.files import hash_file, hash_value, read_json, write_json
from fibldm.synthesis import Output, SynthesisSettings, Synthesizer, jobs_of
from fibldm.synthesis.asked import COVARIATES, check, read
from fibldm.synthesis.scans import AskedScan
from fibldm.synthesis.settings import OPTIONS
from fibldm.typed_settings import counted
from fibldm.volumes.masks import hash_mask, mask_suffix, parts_of

CLAIMED = ".claimed"
ASKED = {
    "covariates.json": '{"age": 63, "sex": "F"}',
    "conditions.json": '{"text": "fibrosis of both lower lobes"}',
}
"""Files of an item that are no masks, with an example of what each says."""

WORKING = ".working"
_LOCK = ".lock"
_DIGITS = 16
_MOST_TRIES = 3
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_ASIDE = "take it from the folder of refused items, correct it, and put it into the inbox again"

_logger = logging.getLogger("fibldm.watch_folder")


def main(arguments: Sequence[str] | None = None) -> None:
    """Watch until asked to end, or with ``--once`` until nothing is left that stands still."""
    chosen = _parser().parse_args(arguments)
    log_to_standard_error()
    with Ending() as ending:
        try:
            watcher = _watcher(chosen)
            for report in watcher.reports(chosen.interval, ending, once=chosen.once):
                if chosen.json:
                    print(json.dumps(report), flush=True)
        except FibldmError as error:
            emit_error(error.message, error.remedy, chosen.json)
            sys.exit(2)
        except OSError as error:  # its text would name the item
            emit_error(f"unexpected error: {error.strerror}", "start again: what was in hand is finished", chosen.json)
            sys.exit(1)
    sys.exit(130 if ending.asked == signal.SIGINT else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="folder or zip of fibldm export")
    parser.add_argument("--inbox", type=Path, required=True, help="folder where masks arrive")
    parser.add_argument("--outbox", type=Path, required=True, help="folder of the results, not in the inbox")
    parser.add_argument("--once", action="store_true", help="end when nothing is left that stands still")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between two looks; 10 by default")
    parser.add_argument("--format", choices=("dicom", "nifti"), default="dicom")
    parser.add_argument("--template", type=Path, help="DICOM only: series that gives technical tags")
    parser.add_argument("--label-codes", type=Path, help="DICOM only: CSV of coded meanings of labels")
    parser.add_argument("--patient-position", help="DICOM only: HFS, FFS, ...; by default the template's, or empty")
    parser.add_argument("--count", type=int, default=1, help="volumes of every mask")
    parser.add_argument("--seed", type=int, help="by default the bundle's, else 0")
    parser.add_argument("--steps", type=int, help="of the sampler; by default the bundle's, else 10")
    parser.add_argument("--guidance", type=float, help="1 is none; by default the bundle's, else 1")
    parser.add_argument(
        "--covariate", action="append", default=[], metavar="NAME=VALUE", help="of all patients; may be repeated"
    )
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="further condition of the bundle, of all masks; may be repeated",
    )
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="FILE=STRENGTH", help="put on the network; may be repeated"
    )
    parser.add_argument(
        "--allow-extrapolation", action="store_true", help="also of masks and conditions unlike the training data"
    )
    parser.add_argument(
        "--check", type=int, help="how often a volume outside of the ranges of training is drawn again; by default none"
    )
    parser.add_argument(
        "--reject-copies",
        metavar="AUDIT",
        help="folder of an audit: a copy of a training scan is drawn again, as often as --check says or 10 times",
    )
    parser.add_argument("--device", help="cpu, cuda, ...; by default cuda where there is one")
    parser.add_argument("--json", action="store_true", help="a line of JSON on standard output for every item")
    return parser


def _watcher(chosen: argparse.Namespace) -> "Watcher":
    """The watcher that the options describe; whatever can be refused before the first item is refused here."""
    _check(chosen)
    options = {name: value for name, value in vars(chosen).items() if name in OPTIONS and value is not None}
    options |= {"covariates": read_named(chosen.covariate), "conditions": read_named(chosen.condition, "--condition")}
    options["adapters"] = read_strengths(chosen.adapter)
    _ = SynthesisSettings.of(**options).files.dicom  # what is refused is so before weights are read
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    synthesizer = Synthesizer.from_bundle(chosen.bundle, device=device)
    settings = SynthesisSettings.of(synthesizer.sampling, **options)
    check(synthesizer.beside, read(synthesizer.beside, settings.asked), allow=settings.allow_extrapolation)
    if not synthesizer.network.sees_mask:
        raise FibldmError("a watch folder needs a bundle that follows masks; this one was trained without", "another")
    return Watcher(chosen.inbox, chosen.outbox, Output(synthesizer, chosen.outbox, settings))


def _check(chosen: argparse.Namespace) -> None:
    if not chosen.inbox.is_dir():
        raise FibldmError(f"--inbox must be a folder; {chosen.inbox} is none", "make it, or check the path")
    if chosen.outbox.resolve().is_relative_to(chosen.inbox.resolve()):
        raise FibldmError(f"--outbox must not lie in the inbox; {chosen.outbox} does", "choose another folder")
    if not chosen.interval > 0 or chosen.count < 1:
        given = f"{chosen.interval:g} and {chosen.count}"
        raise FibldmError(f"--interval must be above 0, and --count at least 1; got {given}")


class Ending:
    """SIGTERM and SIGINT, remembered until the item in hand is done; a context of the main thread."""

    asked: int | None = None

    def __enter__(self) -> "Ending":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: object) -> None:
        self.asked = number

    def wait(self, seconds: float) -> None:
        """Sleep, in slices: Python goes on sleeping after a signal."""
        until = time.monotonic() + seconds
        while self.asked is None and (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, 0.2))


@dataclass
class Watcher:
    """Turns what arrives in an inbox into volumes in an outbox.

    Attributes:
        inbox: where items arrive; names that begin with a dot are left alone.
        outbox: where volumes and finished items go.
        output: how volumes are made; its folder does not matter.
    """

    inbox: Path
    outbox: Path
    output: Output
    _seen: dict[Path, "State"] = field(init=False, default_factory=dict)

    def reports(self, interval: float, ending: Ending, *, once: bool = False) -> Iterator[dict[str, Any]]:
        """Take items until asked to end, or with ``once`` until a look finds nothing to take.

        Yields:
            For every item ``ok`` and its name ``item``, with ``outputs`` and how many files were ``left_out`` as no
            masks, or with ``error`` as the command line has it.

        Raises:
            FibldmError: the outbox holds volumes of other weights or options, labels have no codes for DICOM, or a
                folder cannot be written or is full.
        """
        self._begin()
        with own_folder(self.inbox / CLAIMED) as claims, own_folder(self.outbox / WORKING) as working:
            self._settled()
            while ending.asked is None:
                ending.wait(interval)
                taken = 0
                for item, tries in self._waiting(claims, working):
                    if ending.asked is None and (claimed := _claim(item, claims / str(tries + 1))) is not None:
                        yield self._handled(claimed, tries, working)
                        taken += 1
                if once and not taken:
                    return

    def _begin(self) -> None:
        """Write down what the outbox holds, or see that it is the same."""
        generator, dicom, asked = self.output.synthesizer, self.output.dicom, self.output.settings
        facts = {
            "source": generator.source,
            "sampling": asked.sampling.to_dict(),
            "allow_extrapolation": asked.allow_extrapolation,
            "count": asked.count,
            **{name: part for name in ("covariates", "conditions") if (part := dict(getattr(asked, name)))},
            **({"check": asked.check} if asked.check is not None else {}),
            **({"reject_copies": asked.known_scans.fingerprint} if asked.known_scans is not None else {}),
            "dicom": dicom.fingerprint(generator.names) if dicom is not None else None,
        }
        kinds, further = generator.beside, read(generator.beside, asked.asked)
        told = {name: kinds[name].told(further[name]) for name in asked.conditions}
        request = {"request": hash_value(facts), **facts, **({"conditions": told} if told else {})}
        file = self.outbox / "request.json"
        if file.exists() and read_json(file).get("request") != request["request"]:
            raise FibldmError(
                f"{self.outbox} must hold volumes of one bundle and one choice of options; it was begun with others",
                "choose another --outbox, or take the change back",
            )
        write_json(file, request)

    def _waiting(self, claims: Path, working: Path) -> list[tuple[Path, int]]:
        """What watchers that are no more had in hand, and how many of them; then what stands still. Half results go."""
        for folder in abandoned(self.outbox / WORKING, working):
            shutil.rmtree(folder, ignore_errors=True)
        left: list[tuple[Path, int]] = []
        for folder in abandoned(self.inbox / CLAIMED, claims):
            left += [(item, int(item.parent.name)) for item in folder.glob("*/*")]
            _remove_if_empty(folder)
        return left + [(item, 0) for item in self._settled()]

    def _settled(self) -> list[Path]:
        """Items in the state in which the last look saw them."""
        before = self._seen
        self._seen = {item: state for item in sorted(self.inbox.glob("[!.]*")) if (state := state_of(item))}
        return [item for item, state in self._seen.items() if before.get(item) == state]

    def _handled(self, claimed: Path, tries: int, working: Path) -> dict[str, Any]:
        began, name = time.monotonic(), secrets.token_hex(_DIGITS // 2)  # of what cannot be read
        try:
            hashes = hashes_of(claimed)
            name = name_of(claimed, hashes)
            _check_tries(tries)
            asked = self.output.settings
            known, further = (asked_among(hashes, file) for file in ASKED)
            kinds = self.output.synthesizer.beside
            scans = {kind: scan for kind, scan in further.items() if kind in kinds and kinds[kind].of_scan and scan}
            with aliased_scans(claimed, scans) as opened:
                further |= opened
                conditions = {**asked.conditions, **further}
                asked = replace(asked, covariates={**asked.covariates, **known}, conditions=conditions)
                others = without_scans(claimed, hashes, scans)
                masks = masks_among(others)
                left_out = _left_out(others, masks)
                outputs = self._made(asked, working / name, self.outbox / "synthetic" / name, masks)
        except FibldmError as error:
            if getattr(error.__cause__, "errno", None) in _NO_ROOM:  # no fault of the item, which stays in hand
                raise
            return self._refused(claimed, name, error)
        except Exception as error:  # one bad item never stops the others
            what = error.strerror if isinstance(error, OSError) else error  # its text would name files
            reason = f"unexpected error: {type(error).__name__}: {what}"
            return self._refused(claimed, name, FibldmError(reason.splitlines()[0], _ASIDE))
        (self.outbox / "refused" / f"{name}.json").unlink(missing_ok=True)
        hand_over(claimed, self.outbox / "done" / name)
        values = read(kinds, asked.asked)
        said = [(kind_name, kind.told(values[kind_name])) for kind_name, kind in kinds.items() if kind.parts]
        told = "; ".join(text if kind_name == COVARIATES else f"{kind_name} {text}" for kind_name, text in said)
        told = told and f" ({told})"
        made, other = counted(len(outputs), "volume"), counted(left_out, "file")
        _logger.info("%s: %s, %s left out as no masks, %.1f s%s", name, made, other, time.monotonic() - began, told)
        return {"ok": True, "item": name, "outputs": [str(path) for path in outputs], "left_out": left_out}

    def _made(self, asked: SynthesisSettings, staging: Path, place: Path, masks: Mapping[str, Path]) -> list[Path]:
        """The volumes of an item, all or none; those that lie there are of the same content and options."""
        if not place.exists():
            try:
                self._write(replace(self.output, folder=staging, settings=asked), masks)
                publish(staging, place)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        there = replace(self.output, folder=place, settings=asked)
        return [there.path(job) for job in jobs_of(map(Path, masks), {}, asked.count)]

    def _write(self, output: Output, masks: Mapping[str, Path]) -> None:
        """By aliases, so that no name reaches a sidecar or a message."""
        with tempfile.TemporaryDirectory() as folder:
            for name, file in masks.items():
                alias = linked(file, Path(folder) / Path(name).stem, name)
                for job in jobs_of([alias], output.synthesizer.names, output.settings.count):
                    output.write([job])

    def _refused(self, claimed: Path, name: str, error: FibldmError) -> dict[str, Any]:
        told = {"message": error.message, "remedy": error.remedy}
        report: dict[str, Any] = {"ok": False, "item": name, "error": told}
        write_json(self.outbox / "refused" / f"{name}.json", report)
        hand_over(claimed, self.outbox / "refused" / name)
        _logger.warning("%s: refused; %s", name, sentence(**told))
        return report


State = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of every file of an item; empty where there is none."""


def state_of(item: Path) -> State:
    """The state of an item, by which it is told that nobody writes to it any more."""
    try:
        found = [(file, file.lstat()) for file in files_of(item)]
    except FileNotFoundError:  # another watcher took it
        return ()
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found)


def files_of(item: Path) -> list[Path]:
    """The item itself, or all that a folder holds but folders; links as they are."""
    if item.is_symlink() or not item.is_dir():
        return [item]
    return sorted(part for part in item.rglob("*") if part.is_symlink() or not part.is_dir())


def hashes_of(item: Path) -> dict[Path, str]:
    """SHA-256 of every file of an item.

    Raises:
        FibldmError: it holds something else than files, or one that cannot be read.
    """
    files = files_of(item)
    if any(file.is_symlink() or not file.is_file() for file in files):
        raise FibldmError("an item must be a file or a folder of files; it is or holds a link or a device", _ASIDE)
    try:
        return {file: hash_file(file) for file in files}
    except OSError as error:
        raise FibldmError(f"an item must be readable; {error.strerror}", "check its permissions") from None


def name_of(item: Path, hashes: Mapping[Path, str]) -> str:
    """The beginning of a file's SHA-256, or of that of a folder's names and contents."""
    if item in hashes:
        return hashes[item][:_DIGITS]
    return hash_value(sorted((str(file.relative_to(item)), digest) for file, digest in hashes.items()))[:_DIGITS]


def masks_among(hashes: Mapping[Path, str]) -> dict[str, Path]:
    """The masks of an item, by names that tell no patient; all else is left alone.

    Raises:
        FibldmError: there is none.
    """
    kinds = {file: mask_suffix(file) for file in sorted(hashes) if not file.name.startswith(".")}
    masks = {f"{hash_mask(file)[:_DIGITS]}{suffix}": file for file, suffix in kinds.items() if suffix is not None}
    if not masks:
        raise FibldmError("an item must hold a mask: NIfTI, NRRD, MetaImage or DICOM segmentation; it does not", _ASIDE)
    return masks


def _left_out(hashes: Mapping[Path, str], masks: Mapping[str, Path]) -> int:
    """How many files of an item are no masks; copies of one count as it does."""
    taken = {hashes.get(file) for mask in masks.values() for file in (mask, *parts_of(mask))}
    return sum(digest not in taken for file, digest in hashes.items() if file.name not in ASKED)


def asked_among(hashes: Mapping[Path, str], name: str) -> dict[str, Any]:
    """What a file of the item says of its patient, or asks for, by name.

    Raises:
        FibldmError: there are two of it, or it is no JSON of values by name.
    """
    files = [file for file in hashes if file.name == name]
    if not files:
        return {}
    try:
        (content,) = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    except (ValueError, OSError) as error:
        raise FibldmError(f"an item may hold one {name}, which is JSON; it does not", _ASIDE) from error
    if not isinstance(content, dict):
        raise FibldmError(f"{name} must be such as {ASKED[name]}, null is unknown", _ASIDE)
    return content


@contextmanager
def aliased_scans(item: Path, named: Mapping[str, Any]) -> Iterator[dict[str, AskedScan]]:
    """Scans that an item names by paths in itself; they are called by their content, as their names may tell patients.

    Raises:
        FibldmError: one is no file of the item, and no folder of one series in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        opened = {}
        for number, (kind, path) in enumerate(named.items()):
            try:
                place = _within(item, path)
                suffix = "" if place.is_dir() else place.suffix
                suffix = ".nii.gz" if place.name.lower().endswith(".nii.gz") else suffix
                scan = AskedScan.of_path(linked(place, Path(folder) / f"{number}", f"scan{suffix}"))
            except (FibldmError, OSError, ValueError):
                raise FibldmError(
                    f"{kind} must name a file of the item, or a folder in it with one series; it does not", _ASIDE
                ) from None
            opened[kind] = replace(scan, name=scan.sha256[:_DIGITS])
        yield opened


def without_scans(item: Path, hashes: Mapping[Path, str], named: Mapping[str, Any]) -> dict[Path, str]:
    """What an item holds beside the scans that it names, which are no masks."""
    places = [_within(item, path) for path in named.values()]
    scans = {part for place in places for part in (place, *parts_of(place))}
    return {file: digest for file, digest in hashes.items() if scans.isdisjoint((file, *file.parents))}


def linked(file: Path, folder: Path, name: str) -> Path:
    """A link of another name to a file, or to a folder, in a folder of its own, beside links to what belongs to it."""
    folder.mkdir()
    (folder / name).symlink_to(file.absolute())
    for part in parts_of(file):
        (folder / part.name).symlink_to(part.absolute())
    return folder / name


def _within(item: Path, path: Any) -> Path:
    """The place that a path in an item names.

    Raises:
        FibldmError: it is no path, or leads out of the item.
    """
    place = item / path if isinstance(path, str) else item
    if place.resolve() == item.resolve() or not place.resolve().is_relative_to(item.resolve()):
        raise FibldmError("paths of an item must lie in it", _ASIDE)
    return place


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A folder of this process, which others can tell to be abandoned when the process is no more.

    The lock on a file in it says so: the kernel takes it back however the process ends.

    Raises:
        FibldmError: it cannot be made.
    """
    name = secrets.token_hex(8)
    try:
        (parent / f".{name}").mkdir(parents=True)
        lock = (parent / f".{name}" / _LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = (parent / f".{name}").rename(parent / name)  # not to be seen before it is locked
    except OSError as error:
        raise FibldmError(f"{parent.parent} must be writable; {error.strerror}", "check its permissions") from error
    with lock:
        try:
            yield folder
        finally:
            _remove_if_empty(folder)


def abandoned(parent: Path, own: Path) -> list[Path]:
    """Folders beside an own one whose process is no more."""
    return [folder for folder in sorted(parent.glob("[!.]*")) if folder != own and not _is_held(folder)]


def _is_held(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # locked, or not ours to lock
        return True
    return False


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.glob("*/*")):
        shutil.rmtree(folder, ignore_errors=True)  # another watcher may do the same


def _check_tries(tries: int) -> None:
    """An item that kills its watcher, for want of memory for instance, must not stop those behind it for ever."""
    if tries >= _MOST_TRIES:
        raise FibldmError(
            f"an item must not end its watcher; {tries} watchers ended with this one in hand",
            "is the memory enough for it? put it into the inbox again where it is",
        )


def _claim(item: Path, folder: Path) -> Path | None:
    """The item in a folder of this process, or None where another watcher was faster, or it cannot be moved."""
    try:
        folder.mkdir(exist_ok=True)
        return item.rename(folder / item.name)
    except FileNotFoundError:
        return None
    except OSError as error:
        _logger.warning("an item of the inbox cannot be taken: %s", error.strerror)
        return None


def publish(staging: Path, place: Path) -> None:
    """Rename results to their place, unless another watcher made the same meanwhile."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        staging.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def hand_over(item: Path, folder: Path) -> None:
    """Move an item into a folder, of another file system as well.

    What has its name there is the same item, or what a killed watcher had copied of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / item.name
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    shutil.move(item, place)


if __name__ == "__main__":
    main()
