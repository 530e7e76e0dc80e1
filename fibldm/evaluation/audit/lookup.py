"""Each volume of an audit, read once: what it is most similar to, and where it lies in both feature spaces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json
from fibldm.progress import track
from fibldm.volumes.detail import Floats, Opened, Prepared
from fibldm.volumes.formats.nifti import read_nifti
from fibldm.volumes.grid import Volume
from fibldm.volumes.matching import Match, Matcher, Transform, Turn
from fibldm.workers import Engine, Work

_KEPT_EVERY = 10  # volumes


@dataclass(frozen=True)
class Scan:
    """A volume of one of the three sets.

    Attributes:
        name: its file's, without the suffix.
        subject: its patient.
        file: NIfTI.
        mask: NIfTI of its labels; None where there are none.
        channels: of the file, of which the first is compared.
    """

    name: str
    subject: str
    file: Path
    mask: Path | None = None
    channels: int = 1

    def volume(self) -> Volume:
        """Its first channel.

        Raises:
            FibldmError: the file cannot be read, or holds other channels.
        """
        raw = read_nifti(self.file)
        if self.channels > 1:
            if raw.array.shape[3:] != (self.channels,):
                raise FibldmError(
                    f"{self.file} must hold {self.channels} channels, as (X, Y, Z, C); its shape is {raw.array.shape}"
                )
            raw = replace(raw, array=raw.array[..., 0])
        return raw.volume(str(self.file))[0]


@dataclass(frozen=True)
class Seen:
    """What an audit keeps of a volume.

    Attributes:
        match: the training scan that is most similar to it.
        features: where it lies in both feature spaces.
        own: similarity with the scan of its own mask, as it lies; None where there is none.
    """

    match: Match
    features: tuple[Floats, ...]
    own: float | None = None


class Lookup:
    """Looks volumes up, and keeps matches by the content of their files, so that an audit goes on where it stopped.

    Args:
        file: where matches are kept.
        matcher: of the training scans.
        contents: SHA-256 of the files of volumes.
    """

    def __init__(self, file: Path, matcher: Matcher, contents: Mapping[Path, str]) -> None:
        self.file, self.matcher, self.contents = file, matcher, contents
        kept: dict[str, Any] = read_json(file) if file.exists() else {}
        self.matches: dict[str, Any] = kept["matches"] if kept.get("training") == matcher.fingerprint else {}

    def see(self, scan: Scan, own: Prepared | None = None) -> tuple[Seen, Prepared]:
        """A volume, read once, and as it lies in the cube.

        Args:
            scan: the volume.
            own: the scan of its own mask.

        Raises:
            FibldmError: the file cannot be read, or is constant.
        """
        opened = _opened(self.matcher, scan)
        prepared = opened.at()
        features = tuple(rows[0] for rows in self.matcher.features_of([prepared]))
        similarity = None if own is None else self.matcher.similarity(own, prepared)
        return Seen(self._match(scan, opened), features, similarity), replace(prepared)  # as bare as it was

    def fill(self, scans: Sequence[Scan], engine: Engine, training: Path) -> None:
        """Have the engine look volumes up, where it is not this process.

        Args:
            scans: those that will be seen.
            engine: looks.
            training: what the matcher wrote of the training scans.
        """
        if engine.here:
            return
        missing = list(
            {self.contents[scan.file]: scan for scan in scans if self.contents[scan.file] not in self.matches}.values()
        )
        work = Work(_matched, partial(Matcher.read, training), "looked a volume up", training.parent)
        found = engine.each(work, [(scan,) for scan in missing], lambda places: track(places, "look up"))
        for place, (scan, match) in enumerate(zip(missing, found, strict=True)):
            self.matches[self.contents[scan.file]] = match
            if place % _KEPT_EVERY == 0:
                self.keep()

    def keep(self) -> None:
        """Write the matches."""
        write_json(self.file, {"training": self.matcher.fingerprint, "matches": self.matches})

    def _match(self, scan: Scan, opened: Opened) -> Match:
        content = self.contents[scan.file]
        if content not in self.matches:
            self.matches[content] = _told(self.matcher.match(opened))
            if len(self.matches) % _KEPT_EVERY == 0:
                self.keep()
        index, similarity, (axes, signs), scale, shift, inverted = self.matches[content]
        return Match(index, similarity, Transform(Turn(tuple(axes), tuple(signs)), scale, tuple(shift), inverted))


def _opened(matcher: Matcher, scan: Scan) -> Opened:
    try:
        return matcher.open(scan.volume())
    except FibldmError as error:
        told = error.message if str(scan.file) in error.message else f"{scan.file}: {error.message}"
        raise FibldmError(told, error.remedy) from error


def _matched(matcher: Matcher, scan: Scan) -> list[Any]:
    """What a volume is most similar to, on a worker."""
    return _told(matcher.match(_opened(matcher, scan)))


def _told(match: Match) -> list[Any]:
    return [match.scan, match.similarity, *match.transform]
