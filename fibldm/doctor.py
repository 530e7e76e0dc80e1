"""What ``fibldm doctor`` finds: versions against their supported ranges, device, memory, disk, data, extras."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from fibldm import __version__
from fibldm.workers import cores

GIGABYTE = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Args:
        name: what was looked at, such as ``torch`` or ``memory``.
        value: what was found.
        level: ``note`` limits what FibLDM can do here, ``problem`` stops it.
        remedy: what to do about a note or a problem; may be empty.
    """

    name: str
    value: str
    level: Literal["ok", "note", "problem"] = "ok"
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Look at this machine and this environment; imports torch, and never raises for what it finds missing."""
    requirements = _requirements()
    return [
        Finding("FibLDM", __version__),
        Finding("Python", platform.python_version()),
        *(_check_core(requirement) for requirement in requirements if _extra_of(requirement) is None),
        *_check_extras(requirements),
        *_check_devices(),
        _check_memory(),
        Finding("disk", f"{shutil.disk_usage(Path.cwd()).free / GIGABYTE:.1f} GB free in the current folder"),
        _check_data(),
    ]


def _requirements() -> list[Requirement]:
    """The package's own requirements, those of the extras included; the ranges of pyproject.toml, as installed."""
    try:
        return [Requirement(line) for line in metadata.requires("fibldm") or []]
    except metadata.PackageNotFoundError:
        return []


def _extra_of(requirement: Requirement) -> str | None:
    """The extra a requirement belongs to; ``None`` for the core."""
    extras = metadata.metadata("fibldm").get_all("Provides-Extra") or []
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return None
    return next((extra for extra in extras if requirement.marker.evaluate({"extra": extra})), None)


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_core(requirement: Requirement) -> Finding:
    name, version = requirement.name, _installed_version(requirement.name)
    remedy = f'pip install "{name}{requirement.specifier}"'
    if version is None:
        return Finding(name, "missing", "problem", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, f"{version}, supported is {requirement.specifier}", "problem", remedy)
    return Finding(name, version)


def _check_extras(requirements: list[Requirement]) -> Iterator[Finding]:
    for requirement in requirements:
        extra = _extra_of(requirement)
        if extra in (None, "dev"):
            continue
        version = _installed_version(requirement.name)
        name = f"extra {extra}"
        if version is None:
            yield Finding(name, f"{requirement.name} not installed", "note", f'pip install "fibldm[{extra}]"')
        else:
            yield Finding(name, f"{requirement.name} {version}")


def _check_devices() -> Iterator[Finding]:
    yield Finding("CPU", f"{cores()} cores")
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("device", f"torch cannot be imported: {error}", "problem", "install torch anew")
        return
    yield _check_bfloat16("cpu", "bfloat16")
    if not torch.cuda.is_available():
        yield Finding(
            "CUDA",
            f"no device (torch {torch.__version__})",
            "note",
            "all works on the CPU; trainings of large volumes need a GPU",
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / GIGABYTE:.1f} GB"
        bfloat16 = "bf16" if properties.major >= 8 else "no bf16"  # native since compute capability 8.0
        yield Finding(f"CUDA {index}", f"{properties.name}, {memory}, {bfloat16}")
        if properties.major >= 8:
            yield _check_bfloat16(f"cuda:{index}", f"bfloat16, CUDA {index}")


def _check_bfloat16(device: str, name: str) -> Finding:
    """Whether layers of a few shapes, small ones at the bottom of a network among them, agree with float32."""
    from torch import nn

    from fibldm.models.precision_check import LayerShape, compare, has_bfloat16_units

    down = nn.Conv3d(32, 32, 3, stride=2, padding=1)
    shapes: tuple[tuple[nn.Module, tuple[int, ...]], ...] = (
        (nn.Conv3d(32, 32, 3, padding=1), (1, 32, 8, 8, 8)),
        (down, (1, 32, 8, 8, 4)),
        (down, (1, 32, 4, 4, 2)),  # to one cell along z: PyTorch issue 169688
        (down, (1, 32, 4, 4, 1)),
        (nn.Conv3d(32, 64, 1), (1, 32, 4, 4, 4)),
        (nn.ConvTranspose3d(32, 32, 2, stride=2), (1, 32, 4, 4, 2)),
        (nn.Linear(64, 64), (1, 64, 64)),
    )
    found = [compare(LayerShape("", layer.to(device), shape)) for layer, shape in shapes]
    if wrong := [disagreement for disagreement in found if disagreement is not None]:
        value = f"{len(wrong)} of {len(shapes)} layer shapes differ from float32: {'; '.join(map(str, wrong))}"
        return Finding(name, value, "note", "training finds such layers and runs them in float32")
    imitated = "" if device != "cpu" or has_bfloat16_units() else "; this CPU has no units for it and is slow in it"
    return Finding(name, f"{len(shapes)} layer shapes agree with float32{imitated}")


def _check_memory() -> Finding:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
        free = os.sysconf("SC_AVPHYS_PAGES") * page
    except (ValueError, OSError, AttributeError):
        return Finding("memory", "unknown on this system", "note")
    return Finding("memory", f"{total / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB free")


def _check_data() -> Finding:
    named = os.environ.get("FIBLDM_DATA")
    if named is None:
        return Finding("FIBLDM_DATA", "not set", "note", "tests on real data need it: set it to their folder")
    if not Path(named).is_dir():
        return Finding("FIBLDM_DATA", f"{named} is not a folder", "note", "correct or unset it")
    return Finding("FIBLDM_DATA", named)
