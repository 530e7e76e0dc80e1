"""Kill a DICOM node at random moments under load, and see that every acknowledged mask gave exactly one result.

    python scripts/prove_node.py --bundle BUNDLE --out OUT --masks 50 --kills 30 --minutes 10

Three senders send masks, each until it is acknowledged, to a `fibldm node` that is ended by SIGKILL and started again,
over and over (with `--max-tries 99`, as no mask is at fault here); an archive of this script gets the results. In the
end the node is let finish, and then for every mask that was acknowledged the archive must have one series of all its
slices and one segmentation, nothing else, and the node's folder no trace of anything half done. The last line is a
JSON object.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pynetdicom import AE, build_context, evt

from fibldm.cli import run
from fibldm.files import hash_file
from fibldm.serving.dicom.objects import IMAGES, SEGMENTATIONS, keep
from fibldm.synthesis import Synthesizer
from fibldm.volumes.dicom.label_codes import load_label_codes
from fibldm.volumes.dicom.segmentation_writer import write_segmentation
from fibldm.volumes.dicom.writer import Identity, make_series
from fibldm.volumes.grid import Volume

SHAPE, SPACING = (20, 22, 18), 10.0
OPTIONS = ("--steps", "1", "--allow-extrapolation", "--device", "cpu", "--idle", "20", "--max-tries", "99")


def forked(words: list[str], modules: str = "fibldm.serving.dicom.node") -> None:
    """Run a command of fibldm for every line that comes, each in a process of its own."""
    import_module(modules)
    Synthesizer.from_bundle(Path(words[words.index("--bundle") + 1]), device="cpu")
    for _ in sys.stdin:
        if (child := os.fork()) == 0:
            os._exit(run(words))
        print(f"pid {child}", flush=True)
        print(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


def main() -> int:
    arguments = _parsed()
    arguments.out.mkdir(parents=True)
    drawn = random.Random(arguments.seed)
    names = dict(Synthesizer.from_bundle(arguments.bundle, device="cpu").names)
    masks = [write_mask(arguments.out / "masks", number, names) for number in range(arguments.masks)]
    archive, until = Archive(), time.monotonic() + 60 * arguments.minutes
    node = Node(arguments.bundle, arguments.out, archive.port)
    senders = [Sender(node, masks[k::3], arguments.pause, k) for k in range(3)]
    kills, moments = 0, Counter[str]()
    node.start()
    for sender in senders:
        sender.start()
    while kills < arguments.kills and time.monotonic() < until:
        time.sleep(drawn.expovariate(1 / arguments.life))
        moments[node.state()] += 1
        node.kill()
        kills += 1
        node.start()
    for sender in senders:
        sender.join()
    acknowledged = [mask for sender in senders for mask in sender.acknowledged]
    finished = node.finish()
    found = faults(acknowledged, masks, archive, arguments.out / "node") + ([] if finished else ["did not finish"])
    told = {
        "ok": not found,
        "kills": kills,
        "at": dict(moments),
        "masks": len(masks),
        "acknowledged": len(acknowledged),
        "not acknowledged at first": sum(sender.again for sender in senders),
        "objects": len(archive.contents),
        "sent twice": sum(archive.times.values()) - len(archive.times),
        "faults": found,
    }
    print(json.dumps(told))
    return 0 if not found else 1


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--masks", type=int, default=50)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=10.0, help="no kill after these")
    parser.add_argument("--life", type=float, default=4.0, help="mean seconds from listening to a kill")
    parser.add_argument("--pause", type=float, default=6.0, help="mean seconds between two masks of a sender")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_mask(folder: Path, number: int, names: dict[int, str]) -> Path:
    """A segmentation that differs from all others, as if another program had made it."""
    folder.mkdir(exist_ok=True)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    first, second = sorted(names)[:2]
    labels[2 : 6 + number % 12, 5:17, 11:17] = first
    labels[3:14, 6 : 8 + number // 12, 2:9] = second
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    identity = Identity(patient=f"patient {number}", key=f"mask {number}")
    volume, ranges = Volume(np.zeros(SHAPE, dtype=np.int16), affine), (-1024.0, 600.0)
    series = make_series(volume, modality="ct", value_range=ranges, identity=identity)
    meanings = load_label_codes(None).find(names.values())
    file = folder / f"{number}.dcm"
    write_segmentation(
        *(file, Volume(labels, affine)), names=names, meanings=meanings, series=series, identity=identity
    )
    dataset = pydicom.dcmread(file)
    dataset.Manufacturer = "Prover"
    del dataset.SyntheticData
    dataset.save_as(file)
    return file


class Archive:
    """Stores what the node sends: by SOP Instance UID its contents, class, series and patient."""

    def __init__(self) -> None:
        self.contents: dict[str, set[str]] = defaultdict(set)
        self.facts: dict[str, tuple[str, str, str]] = {}
        self.times: Counter[str] = Counter()
        entity = AE(ae_title="ARCHIVE")
        for sop_class in (*SEGMENTATIONS, *IMAGES):
            entity.add_supported_context(sop_class)
        server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._keep)])
        assert server is not None
        self.port = int(server.server_address[1])

    def _keep(self, event: Any) -> int:
        dataset, uid = event.dataset, str(event.request.AffectedSOPInstanceUID)
        self.facts[uid] = (str(dataset.SOPClassUID), str(dataset.SeriesInstanceUID), str(dataset.PatientID))
        self.contents[uid].add(hashlib.sha256(event.encoded_dataset(include_meta=False)).hexdigest())
        self.times[uid] += 1
        return 0x0000


class Forked:
    """A service under test: a process that is forked from one that has loaded all modules, which takes the longest."""

    def __init__(self, words: Sequence[Any], log: Path) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, *map(str, words)]
        self._loaded = subprocess.Popen(command, stderr=log.open("ab"), **pipes)
        self._child = 0

    def begin(self) -> None:
        """A new process."""
        assert self._loaded.stdin is not None
        self._loaded.stdin.write("start\n")
        self._loaded.stdin.flush()
        self._child = int(self.read("pid "))

    def kill(self) -> None:
        """By SIGKILL."""
        os.kill(self._child, signal.SIGKILL)
        self.read("ended ")

    def end(self) -> bool:
        """Whether it ends as it should when it is asked to."""
        os.kill(self._child, signal.SIGTERM)
        ended = int(self.read("ended ")) == 0
        self._loaded.kill()
        return ended

    def read(self, beginning: str) -> str:
        """The rest of the next line that begins so."""
        assert self._loaded.stdout is not None
        for line in self._loaded.stdout:
            if line.startswith(beginning):
                return line.removeprefix(beginning)
            if line.startswith("ended "):
                break
        raise SystemExit("the service ended by itself; see its log")


class Node(Forked):
    """The node under test, by its port."""

    def __init__(self, bundle: Path, out: Path, archive: int) -> None:
        callers = [word for k in range(3) for word in ("--caller", f"SENDER{k}@127.0.0.1")]
        places = ["--bundle", bundle, "--out", out / "node", "--port", "0", "--send", f"ARCHIVE@127.0.0.1:{archive}"]
        super().__init__([__file__, "--forked", "node", *places, *callers, *OPTIONS], out / "node.log")
        self._store, self.port = out / "node" / "jobs.sqlite", 0

    def start(self) -> None:
        """Returns when it listens."""
        self.begin()
        self.port = int(self.read("FIBLDM listens on 127.0.0.1:"))

    def kill(self) -> None:
        """By SIGKILL."""
        self.port = 0
        super().kill()

    def state(self) -> str:
        """What it is at, for the record."""
        states = [str(row[0]) for row in self._rows("SELECT state FROM jobs")]
        owed = len(self._rows("SELECT 1 FROM deliveries JOIN jobs ON id = job WHERE state = 'done' AND NOT ended"))
        return ("making" if "running" in states else "idle") + (" and sending" if owed else "")

    def finish(self) -> bool:
        """Wait until nothing is left, and end it; whether it ended as it should."""
        until = time.monotonic() + 600
        left = "SELECT 1 FROM jobs LEFT JOIN deliveries ON id = job WHERE state != 'done' OR NOT ifnull(ended, 0)"
        while self._rows(left) and time.monotonic() < until:
            time.sleep(0.5)
        return self.end()

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self._store, timeout=30)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()


class Sender(threading.Thread):
    """Sends masks one after the other, each until it is acknowledged."""

    def __init__(self, node: Node, masks: list[Path], pause: float, number: int) -> None:
        super().__init__(daemon=True)
        self._node, self._masks, self._pause, self._number = node, masks, pause, number
        self._drawn = random.Random(number)
        self.acknowledged: list[Path] = []
        self.again = 0

    def run(self) -> None:
        for mask in self._masks:
            while not self._sent(mask):
                self.again += 1
                time.sleep(0.3)
            self.acknowledged.append(mask)
            time.sleep(self._drawn.expovariate(1 / self._pause))

    def _sent(self, mask: Path) -> bool:
        if not (port := self._node.port):
            return False
        entity = AE(ae_title=f"SENDER{self._number}")
        entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = 10
        association = entity.associate("127.0.0.1", port, [build_context(SEGMENTATIONS[0])], ae_title="FIBLDM")
        try:
            return association.is_established and association.send_c_store(mask).get("Status") == 0x0000
        except (RuntimeError, ValueError, OSError):  # it was killed in between
            return False
        finally:
            if association.is_established:
                association.release()


def faults(acknowledged: list[Path], masks: list[Path], archive: Archive, folder: Path) -> list[str]:
    """What is not as it must be."""
    patients = {mask: _patient(mask, folder.parent / "kept.dcm") for mask in masks}
    of_patient: dict[str, list[str]] = defaultdict(list)
    for uid, (_, _, patient) in archive.facts.items():
        of_patient[patient].append(uid)
    found = [f"{uid} has several contents" for uid, contents in archive.contents.items() if len(contents) > 1]
    for mask in acknowledged:
        facts = [archive.facts[uid] for uid in of_patient.pop(patients[mask], [])]
        images = [series for sop_class, series, _ in facts if sop_class in IMAGES]
        segmentations = [series for sop_class, series, _ in facts if sop_class in SEGMENTATIONS]
        if len(images) != SHAPE[2] or len(set(images)) != 1 or len(segmentations) != 1:
            found.append(
                f"mask {mask.stem}: {len(images)} images of {len(set(images))} series, {len(segmentations)} SEG"
            )
    found += [f"results of no acknowledged mask: {patient}" for patient in of_patient]
    for name in ("spool", ".working", ".received", "series"):
        found += [f"{name} holds something" for _ in (folder / name).glob("*")]
    whole = [len(list(job.glob("*/*.dcm"))) for job in (folder / "results").iterdir()]
    found += [f"results hold {count} files" for count in whole if count != SHAPE[2] + 1]
    connection = sqlite3.connect(folder / "jobs.sqlite")
    states = Counter(row[0] for row in connection.execute("SELECT state FROM jobs"))
    connection.close()
    if states != Counter({"done": len(acknowledged)}) or len(whole) != len(acknowledged):
        found.append(f"jobs are {dict(states)}, results of {len(whole)}")
    return found


def _patient(mask: Path, place: Path) -> str:
    """What the results of a mask name as their patient."""
    keep(mask, place)
    identity = Identity(patient=hash_file(place), key="")
    place.unlink()
    return f"SYNTHETIC-{identity.patient_id}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--forked"]:
        forked(sys.argv[2:])
    else:
        sys.exit(main())
