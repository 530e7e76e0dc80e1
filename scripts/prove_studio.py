"""Kill a studio at random moments under load, and see that every acknowledged mask gives exactly one result.

    python scripts/prove_studio.py --bundle BUNDLE --out OUT --masks 50 --kills 30 --minutes 10

Three senders send masks to a `fibldm studio`, each until it is acknowledged: one by STOW-RS, two by POST /api/jobs. The
studio is ended by SIGKILL and started again, over and over (with `--max-tries 99`, as no mask is at fault here). In the
end it is let finish, and then every mask that was acknowledged must have one job that is done, whose results are whole
by HTTP, and the studio's folder no trace of anything half done. The last line is a JSON object.
"""

import argparse
import gzip
import io
import json
import random
import sqlite3
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import nibabel
import pydicom
from prove_node import SHAPE, Forked, forked, write_mask

from fibldm.synthesis import Synthesizer

OPTIONS = {"steps": 1, "allow_extrapolation": True}
TOKEN = "prove" * 8
KIND = 'multipart/related; type="application/dicom"; boundary=b'


def main() -> int:
    arguments = _parsed()
    arguments.out.mkdir(parents=True)
    drawn = random.Random(arguments.seed)
    names = dict(Synthesizer.from_bundle(arguments.bundle, device="cpu").names)
    masks = [write_mask(arguments.out / "masks", number, names) for number in range(arguments.masks)]
    until = time.monotonic() + 60 * arguments.minutes
    studio = Studio(arguments.bundle, arguments.out)
    senders = [Sender(studio, masks[k::3], arguments.pause, k) for k in range(3)]
    kills, moments = 0, Counter[str]()
    studio.start()
    for sender in senders:
        sender.start()
    while kills < arguments.kills and time.monotonic() < until:
        time.sleep(drawn.expovariate(1 / arguments.life))
        moments[studio.state()] += 1
        studio.kill()
        kills += 1
        studio.start()
    for sender in senders:
        sender.join()
    acknowledged = {mask: job for sender in senders for mask, job in sender.acknowledged.items()}
    found = [] if studio.work() else ["did not finish"]
    found += faults(acknowledged, studio)
    found += [] if studio.end() else ["did not end as asked"]
    found += traces(len(set(acknowledged.values())), arguments.out / "studio")
    told = {
        "ok": not found,
        "kills": kills,
        "at": dict(moments),
        "masks": len(masks),
        "acknowledged": len(acknowledged),
        "not acknowledged at first": sum(sender.again for sender in senders),
        "jobs": len(set(acknowledged.values())),
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


class Studio(Forked):
    """The studio under test, by its address."""

    def __init__(self, bundle: Path, out: Path) -> None:
        token = out / "token"
        token.touch(mode=0o600)
        token.write_text(TOKEN)
        places = ["--bundle", bundle, "--out", out / "studio", "--port", "0", "--token-file", token, "--max-tries", 99]
        super().__init__([__file__, "--forked", "studio", *places, "--device", "cpu"], out / "studio.log")
        self._store = out / "studio" / "jobs.sqlite"
        self.address = ""

    def start(self) -> None:
        """Returns when it listens."""
        self.begin()
        self.address = self.read("open ").partition("/start")[0]

    def kill(self) -> None:
        """By SIGKILL."""
        self.address = ""
        super().kill()

    def client(self) -> httpx.Client:
        """Asks with the token."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Connection": "close"}
        return httpx.Client(base_url=self.address, headers=headers, timeout=60)

    def state(self) -> str:
        """What it is at, for the record."""
        connection = sqlite3.connect(self._store, timeout=30)
        try:
            states = [row[0] for row in connection.execute("SELECT state FROM jobs")]
        finally:
            connection.close()
        return "making" if "running" in states else "waiting" if "waiting" in states else "idle"

    def work(self) -> bool:
        """Wait until nothing is left; whether it came to that."""
        until = time.monotonic() + 600
        while (busy := self.state() != "idle") and time.monotonic() < until:
            time.sleep(0.5)
        return not busy


class Sender(threading.Thread):
    """Sends masks one after the other, each until it is acknowledged."""

    def __init__(self, studio: Studio, masks: list[Path], pause: float, number: int) -> None:
        super().__init__(daemon=True)
        self._studio, self._masks, self._pause, self._number = studio, masks, pause, number
        self._drawn = random.Random(number)
        self.acknowledged: dict[Path, str] = {}
        self.again = 0

    def run(self) -> None:
        for mask in self._masks:
            while (job := self._sent(mask)) is None:
                self.again += 1
                time.sleep(0.3)
            self.acknowledged[mask] = job
            time.sleep(self._drawn.expovariate(1 / self._pause))

    def _sent(self, mask: Path) -> str | None:
        """Its job, where it was acknowledged."""
        if not self._studio.address:
            return None
        try:
            with self._studio.client() as client:
                return self._by_stow(client, mask) if self._number == 0 else self._by_form(client, mask)
        except (httpx.HTTPError, httpx.InvalidURL):  # it was killed in between
            return None

    def _by_stow(self, client: httpx.Client, mask: Path) -> str | None:
        content = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + mask.read_bytes() + b"\r\n--b--\r\n"
        told = {"params": {"options": json.dumps(OPTIONS)}, "headers": {"Content-Type": KIND}}
        answer = client.post("/api/dicomweb/studies", content=content, **told)
        link = answer.headers.get("Link", "")
        return link.partition("/api/jobs/")[2].partition(">")[0] if answer.status_code == 200 else None

    def _by_form(self, client: httpx.Client, mask: Path) -> str | None:
        options = OPTIONS | {"format": "dicom" if self._number == 1 else "nifti"}
        form = {"data": {"options": json.dumps(options)}, "files": {"mask": mask.read_bytes()}}
        answer = client.post("/api/jobs", **form)
        return str(answer.json()["id"]) if answer.status_code == 202 else None


def faults(acknowledged: dict[Path, str], studio: Studio) -> list[str]:
    """What is not as it must be, as the studio tells it."""
    found = []
    if len(set(acknowledged.values())) != len(acknowledged):
        found.append("masks share jobs")
    with studio.client() as client:
        jobs = {job["id"]: job for job in client.get("/api/jobs").json()}
        found += [f"job {id} of no acknowledged mask" for id in jobs.keys() - set(acknowledged.values())]
        for mask, id in acknowledged.items():
            job: dict[str, Any] = jobs.get(id, {"state": "unknown", "volumes": []})
            if job["state"] != "done" or len(job["volumes"]) != 1:
                found.append(f"mask {mask.stem}: {job['state']}, {len(job['volumes'])} volumes")
            else:
                found += [f"mask {mask.stem}: {told}" for told in _wrong(client, job["volumes"][0])]
    return found


def _wrong(client: httpx.Client, volume: dict[str, Any]) -> list[str]:
    content = client.get(volume["address"]).content
    if volume["format"] == "nifti":
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
        return [] if sorted(image.shape) == sorted(SHAPE) and image.get_fdata().any() else ["a volume of another shape"]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        slices = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    uids = {str(one.SOPInstanceUID) for one in slices}
    return [] if len(uids) == len(slices) == SHAPE[2] else [f"a series of {len(slices)} images"]


def traces(jobs: int, folder: Path) -> list[str]:
    """What is left of anything half done, and whether there are as many results as jobs."""
    found = [f"{name} holds something" for name in ("spool", ".working", "series") for _ in (folder / name).glob("*")]
    results = sum(1 for _ in (folder / "results").iterdir())
    return found + ([] if results == jobs else [f"results of {results} jobs, of {jobs}"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--forked"]:
        forked(sys.argv[2:], "fibldm.serving.studio")
    else:
        sys.exit(main())
