"""Masks that arrive in a folder become synthetic volumes, unattended.

An item is a mask (NIfTI, NRRD, MetaImage, DICOM segmentation) or a folder of such. It is taken once it stood still for
an interval, by renaming it, so that several watchers, of several machines too, may share an inbox. Volumes come to
OUTBOX/synthetic/ITEM, all at once; the item goes to OUTBOX/done/ITEM, or to OUTBOX/refused/ITEM with the reason in
OUTBOX/refused/ITEM.json. What a killed watcher had in hand is finished by the next one.
"""

import errno
import logging
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fibldm.errors import FibldmError, sentence
from fibldm.files import hash_value, read_json, write_json
from fibldm.serving.ending import Ending
from fibldm.serving.folders import abandoned, hand_over, own_folder, remove_if_empty
from fibldm.serving.items import DIGITS, State, hashes_of, name_of, opened_item, state_of
from fibldm.serving.making import make, told, unexpected
from fibldm.serving.opening import facts_of
from fibldm.synthesis import Output
from fibldm.synthesis.asked import read
from fibldm.typed_settings import counted

CLAIMED = ".claimed"
WORKING = ".working"
_MOST_TRIES = 3
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_ASIDE = "take it from the folder of refused items, correct it, and put it into the inbox again"

_logger = logging.getLogger("fibldm")


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
    _seen: dict[Path, State] = field(init=False, default_factory=dict)

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
        asked, kinds, facts = self.output.settings, self.output.synthesizer.beside, facts_of(self.output)
        further = read(kinds, asked.asked)
        words = {name: kinds[name].told(further[name]) for name in asked.conditions}
        request = {"request": hash_value(facts), **facts, **({"conditions": words} if words else {})}
        file = self.outbox / "request.json"
        if file.exists() and read_json(file).get("request") != request["request"]:
            raise FibldmError(
                f"{self.outbox} must hold volumes of one bundle and one choice of options; it was begun with others",
                "choose another `outbox`, or take the change back",
            )
        write_json(file, request)

    def _waiting(self, claims: Path, working: Path) -> list[tuple[Path, int]]:
        """What watchers that are no more had in hand, and how many of them; then what stands still. Half results go."""
        for folder in abandoned(self.outbox / WORKING, working):
            shutil.rmtree(folder, ignore_errors=True)
        left: list[tuple[Path, int]] = []
        for folder in abandoned(self.inbox / CLAIMED, claims):
            left += [(item, int(item.parent.name)) for item in folder.glob("*/*")]
            remove_if_empty(folder)
        return left + [(item, 0) for item in self._settled()]

    def _settled(self) -> list[Path]:
        """Items in the state in which the last look saw them."""
        before = self._seen
        self._seen = {item: state for item in sorted(self.inbox.glob("[!.]*")) if (state := state_of(item))}
        return [item for item, state in self._seen.items() if before.get(item) == state]

    def _handled(self, claimed: Path, tries: int, working: Path) -> dict[str, Any]:
        began, name = time.monotonic(), secrets.token_hex(DIGITS // 2)  # of what cannot be read
        try:
            hashes = hashes_of(claimed)
            name = name_of(claimed, hashes)
            _check_tries(tries)
            with opened_item(claimed, hashes, self.output.settings, self.output.synthesizer.beside) as item:
                outputs = make(self.output, item, working / name, self.outbox / "synthetic" / name)
                said = told(self.output, item)
        except FibldmError as error:
            if getattr(error.__cause__, "errno", None) in _NO_ROOM:  # no fault of the item, which stays in hand
                raise
            return self._refused(claimed, name, error)
        except Exception as error:  # one bad item never stops the others
            return self._refused(claimed, name, unexpected(error, _ASIDE))
        (self.outbox / "refused" / f"{name}.json").unlink(missing_ok=True)
        hand_over(claimed, self.outbox / "done" / name)
        made, other = counted(len(outputs), "volume"), counted(item.left_out, "file")
        took, said = time.monotonic() - began, said and f" ({said})"
        _logger.info("%s: %s, %s left out as no masks, %.1f s%s", name, made, other, took, said)
        return {"ok": True, "item": name, "outputs": [str(path) for path in outputs], "left_out": item.left_out}

    def _refused(self, claimed: Path, name: str, error: FibldmError) -> dict[str, Any]:
        told = {"message": error.message, "remedy": error.remedy}
        report: dict[str, Any] = {"ok": False, "item": name, "error": told}
        write_json(self.outbox / "refused" / f"{name}.json", report)
        hand_over(claimed, self.outbox / "refused" / name)
        _logger.warning("%s: refused; %s", name, sentence(**told))
        return report


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
