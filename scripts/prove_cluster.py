"""Volumes drawn by workers of Dask, one of which is killed and one slowed: nothing lost, nothing twice, the same bytes.

    python scripts/prove_cluster.py --bundle BUNDLE --masks MASKS --count 20 --out proof

One process draws all volumes first. Then each worker draws some alone, for its rate; the slow one is stopped nine
tenths of the time. Then all of them draw together, and one is killed, with its nanny, when a third of the volumes is
there. Each worker has a network namespace of its own where the machine permits it (root and `ip netns`), else it is a
process. Needs the extra cluster. Writes OUT/proof.json.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from distributed import LocalCluster
from distributed.diagnostics.plugin import SchedulerPlugin

NAMES = ("steady", "killed", "slow")
SUBNET = "10.213.47"
BRIDGE = "fibldm0"
PERIOD = 0.5  # seconds
READ = "import sys; from fibldm.cli import main; main()"


class Counted(SchedulerPlugin):
    """How often each item began and ended, and where."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.by: Counter[str] = Counter()

    def transition(self, key: Any, start: str, finish: str, *_: Any, **known: Any) -> None:
        self.begun[str(key)] += finish == "processing"
        self.ended[str(key)] += (start, finish) == ("processing", "memory")
        if (start, finish) == ("processing", "memory"):
            self.by[str(known.get("worker"))] += 1


def synthesize(words: list[str], *more: str) -> float:
    """Seconds of a synthesis in a process of its own."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", READ, "synthesize", *words, *more], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def run(*words: str) -> bool:
    return subprocess.run(words, capture_output=True).returncode == 0


@contextmanager
def namespaces(count: int) -> Iterator[bool]:
    """As many network namespaces on one bridge, which has the first address; False where that is not permitted."""
    made = bool(shutil.which("ip")) and run("ip", "link", "add", BRIDGE, "type", "bridge")
    steps = [["addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE], ["link", "set", BRIDGE, "up"]]
    for number in range(count):
        name, outer, inner = f"fibldm{number}", f"fibldm-o{number}", f"fibldm-i{number}"
        steps += [
            ["netns", "add", name],
            ["link", "add", outer, "type", "veth", "peer", "name", inner],
            ["link", "set", outer, "master", BRIDGE, "up"],
            ["link", "set", inner, "netns", name],
            ["-n", name, "addr", "add", f"{SUBNET}.{10 + number}/24", "dev", inner],
            ["-n", name, "link", "set", inner, "up"],
            ["-n", name, "link", "set", "lo", "up"],
        ]
    try:
        yield made and all(run("ip", *step) for step in steps)
    finally:
        for number in range(count):
            run("ip", "netns", "del", f"fibldm{number}")
            run("ip", "link", "del", f"fibldm-o{number}")
        if made:
            run("ip", "link", "del", BRIDGE)


@contextmanager
def worker(address: str, number: int, folder: Path, *, apart: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A worker with its nanny, in a session of its own, so that both can be stopped or killed together."""
    inside = ["ip", "netns", "exec", f"fibldm{number}"] if apart else []
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    command += ["--name", NAMES[number], "--local-directory", str(folder / "scratch")]
    with (folder / f"{NAMES[number]}.log").open("wb") as log:
        process = subprocess.Popen([*inside, *command], stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        tell(process, signal.SIGCONT)
        tell(process, signal.SIGKILL)
        process.wait()


def tell(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a worker and its nanny."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


@contextmanager
def slowed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A worker that is at work for a tenth of the time."""
    done = threading.Event()

    def stop_and_go() -> None:
        while not done.is_set():
            tell(process, signal.SIGSTOP)
            done.wait(0.9 * PERIOD)
            tell(process, signal.SIGCONT)
            done.wait(0.1 * PERIOD)

    thread = threading.Thread(target=stop_and_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def content(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def times(folder: Path) -> list[float]:
    """When the volumes were there, in order."""
    return sorted(file.stat().st_mtime for file in folder.glob("*.nii.gz"))


def rate_alone(out: Path, words: list[str], number: int, host: str, apart: bool, count: int) -> float:
    """Volumes a second of one worker, between its first volume and its last."""
    folder = out / f"alone-{NAMES[number]}"
    with ExitStack() as stack:
        made = stack.enter_context(LocalCluster(n_workers=0, host=host, dashboard_address=None))
        process = stack.enter_context(worker(made.scheduler_address, number, out, apart=apart))
        if NAMES[number] == "slow":
            stack.enter_context(slowed(process))
        synthesize(words, "--count", str(count), "--out", str(folder), "--cluster", made.scheduler_address)
    there = times(folder)
    return (len(there) - 1) / (there[-1] - there[0])


def kill_at(process: subprocess.Popen[bytes], folder: Path, volumes: int, told: list[float]) -> None:
    while len(list(folder.glob("*.nii.gz"))) < volumes:
        time.sleep(0.02)
    tell(process, signal.SIGKILL)
    told.append(time.time())


def together(out: Path, words: list[str], host: str, apart: bool, volumes: int) -> tuple[Counted, float]:
    """All workers on all volumes, one of them killed; what the scheduler saw, and when that was."""
    counted, told = Counted(), list[float]()
    with ExitStack() as stack:
        made = stack.enter_context(LocalCluster(n_workers=0, host=host, dashboard_address=None))
        made.scheduler.add_plugin(counted)
        processes = [
            stack.enter_context(worker(made.scheduler_address, number, out, apart=apart))
            for number in range(len(NAMES))
        ]
        stack.enter_context(slowed(processes[NAMES.index("slow")]))
        kill = (processes[NAMES.index("killed")], out / "cluster", volumes // 3, told)
        threading.Thread(target=kill_at, args=kill, daemon=True).start()
        synthesize(words, "--out", str(out / "cluster"), "--cluster", made.scheduler_address)
    return counted, told[0]


def prove(bundle: Path, masks: Path, count: int, alone: int, out: Path, more: list[str]) -> dict[str, Any]:
    """The proof; see the head of this file."""
    out.mkdir(parents=True)
    words = ["--bundle", str(bundle), "--masks", str(masks), "--device", "cpu", *more]
    os.environ["OMP_NUM_THREADS"] = "1"  # in all processes the same
    all_of = [*words, "--count", str(count)]
    one = synthesize(all_of, "--out", str(out / "one"))
    with namespaces(len(NAMES)) as apart:
        host = f"{SUBNET}.1" if apart else "127.0.0.1"
        rates = [rate_alone(out, words, number, host, apart, alone) for number in range(len(NAMES))]
        volumes = len(times(out / "one"))
        counted, killed = together(out, all_of, host, apart, volumes)
    there = times(out / "cluster")
    before, after = killed - there[0], there[-1] - killed
    possible = (
        sum(rates) * before + sum(rate for name, rate in zip(NAMES, rates, strict=True) if name != "killed") * after
    )
    reference, made = content(out / "one"), content(out / "cluster")
    return {
        "volumes": volumes,
        "network_namespaces": apart,
        "cores": len(os.sched_getaffinity(0)),
        "seconds_of_one_process": round(one, 1),
        "volumes_per_second_alone": {name: round(rate, 4) for name, rate in zip(NAMES, rates, strict=True)},
        "seconds_together": round(there[-1] - there[0], 1),
        "killed_after_seconds": round(before, 1),
        "share_of_the_sum": round((volumes - 1) / possible, 3),
        "same_bytes": made == reference,
        "lost": sorted(reference.keys() - made.keys()),
        "items": len(counted.ended),
        "items_ended_twice": sorted(key for key, times in counted.ended.items() if times != 1),
        "items_begun_again": sorted(key for key, times in counted.begun.items() if times > 1),
        "items_by_worker": dict(counted.by),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20, help="volumes of every mask")
    parser.add_argument("--alone", type=int, default=2, help="volumes of every mask that each worker draws alone")
    parser.add_argument("--out", type=Path, required=True)
    known, more = parser.parse_known_args()
    result = prove(known.bundle, known.masks, known.count, known.alone, known.out, more)
    text = json.dumps(result, indent=2)
    (known.out / "proof.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    sys.exit(0 if result["same_bytes"] and not result["lost"] and not result["items_ended_twice"] else 1)


if __name__ == "__main__":
    main()
