"""When memory is not enough: how much was asked for, and how much there is."""

import errno
import re
import sys
from pathlib import Path

from fibldm.errors import FibldmError

_SAID = re.compile(r"can(no|')t allocate memory|not enough memory|out of memory|bad_alloc|ALLOC_FAILED", re.IGNORECASE)
_ASKED = re.compile(r"allocate (\d[\d.]*) ?(bytes|[KMGT]i?B)")
_UNITS = {"bytes": 1.0, **{f"{prefix}iB": 1024.0**power for power, prefix in enumerate("KMGT", start=1)}}
_REMEDY = "for training, `fibldm plan` says which batch_size and patch fit; to synthesize, take a smaller batch or mask"


def out_of_memory(error: BaseException) -> FibldmError | None:
    """The error for memory that is not enough, of one by NumPy, PyTorch or the system; None for any other."""
    text = str(error)
    of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    of_torch = isinstance(error, RuntimeError) and _SAID.search(text) is not None
    if not (isinstance(error, MemoryError) or of_system or of_torch):
        return None
    found = _ASKED.search(text)
    asked = "it" if found is None else f"{float(found[1]) * _UNITS.get(found[2], 1.0) / 1e9:.3g} GB"
    on_cuda = "CUDA" in text
    there = _free_on_cuda() if on_cuda else _free_here()
    said = "more than there is" if there is None else f"{there / 1e9:.3g} GB are free"
    where = "of the CUDA device" if on_cuda else "of this machine"
    return FibldmError(f"the memory {where} must be enough; {asked} more was asked for, {said}", _REMEDY)


def _free_on_cuda() -> float | None:
    torch = sys.modules.get("torch")
    return None if torch is None or not torch.cuda.is_available() else float(torch.cuda.mem_get_info()[0])


def _free_here() -> float | None:
    """Bytes that the machine has, or that the limit of this process (``ulimit -v``) leaves."""
    import resource

    try:
        pages = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, IndexError):
        return None
    free, limit = 1024 * float(pages), resource.getrlimit(resource.RLIMIT_AS)[0]
    return free if limit == resource.RLIM_INFINITY else min(free, max(0.0, limit - used))
