"""Bundles as data: what `fibldm export` writes, read without running anything that it holds.

``configs/generator.json`` describes the generator by definitions (see `fibldm.synthesis.definitions`), and names the
files of its weights with their SHA-256. The other configurations of a bundle are MONAI's; they are programs, and are
not read here.
"""

import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json
from fibldm.manifest import check_manifest
from fibldm.models.conditions.condition import Condition, present
from fibldm.models.residual_noise import ResidualNoise
from fibldm.runs.renamed import current_generator
from fibldm.synthesis.definitions import build
from fibldm.synthesis.settings import SamplingSettings

FORMAT = 2
GENERATOR = "configs/generator.json"
KEYS = frozenset(
    "format fibldm name version network autoencoder process target conditions shift space grid intensity envelope "
    "labels channels modality licence data_licence data split weights".split()
)

_LARGEST_ARCHIVE = 16 * 2**30
_LARGEST_RATIO = 200  # weights hardly compress at all, JSON some ten times
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
_ASK = "ask for the bundle again, or export it again"


@dataclass(frozen=True)
class Bundle:
    """A generator as a folder.

    Attributes:
        root: the folder.
        facts: content of ``configs/generator.json``.
        trust: make networks of any class that it names.
        changed: what is not as its manifest says, and was trusted nevertheless.
    """

    root: Path
    facts: Mapping[str, Any]
    trust: bool = False
    changed: Sequence[str] = ()

    def made(self, key: str) -> Any:
        """What a definition of ``generator.json`` describes; see `build`."""
        return build(self.facts[key], f"{key} of {self.root / GENERATOR}", trust=self.trust)

    def network(self, key: str) -> nn.Module:
        """The network ``network`` or ``autoencoder`` with its weights, in float32 and evaluation mode.

        Nothing is allocated before shapes and sizes of the weights are known to fit.

        Raises:
            FibldmError: definition or weights are refused.
        """
        file = self._file_of(key)
        with torch.device("meta"):
            empty = self.made(key)
        weights = _tensors(file, empty.state_dict())
        network: nn.Module = self.made(key)
        network.load_state_dict(weights)
        return network.eval()

    def conditions(self) -> dict[str, Condition]:
        """What may be asked for, by name, with the files that it stands on.

        Raises:
            FibldmError: a definition or a file is refused.
        """
        made: dict[str, Condition] = present(self.made("conditions"))
        return {name: part.loaded(self._folder_of(name)) if part.fingerprint else part for name, part in made.items()}

    def residual_noise(self) -> ResidualNoise | None:
        """What the decoder leaves out, where that was measured.

        Raises:
            FibldmError: the file is refused.
        """
        if self.facts["weights"].get("residual_noise") is None:
            return None
        file = self._file_of("residual_noise")
        try:
            return ResidualNoise.load(file)
        except (SafetensorError, KeyError, ValueError) as error:
            raise FibldmError(f"{file} must hold levels, kernel and spread; {error}", _ASK) from error

    def sampling(self) -> SamplingSettings:
        """How its volumes are drawn where nothing else is asked for; bundles of before say nothing of it.

        Raises:
            FibldmError: a setting is unknown, has another type or is out of range.
        """
        given = self.facts.get("sampling", {})
        try:
            return SamplingSettings.from_dict(given)
        except (FibldmError, AttributeError) as error:
            message = error.message if isinstance(error, FibldmError) else f"sampling must be a mapping; got {given!r}"
            raise FibldmError(f"{self.root / GENERATOR}: {message}", _ASK) from error

    def _folder_of(self, name: str) -> Path:
        if not name.isidentifier():
            raise FibldmError(f"{self.root / GENERATOR} must name conditions by plain words; got {name!r}", _ASK)
        folder = self.root / "models" / name
        for file in folder.rglob("*"):
            if not file.is_dir():
                inside(self.root, file.relative_to(self.root).as_posix())
        if not folder.is_dir():
            raise FibldmError(f"{folder} must exist, as the condition {name} stands on it", _ASK)
        return folder

    def _file_of(self, key: str) -> Path:
        try:
            entry = self.facts["weights"][key]
            name, expected = str(entry["file"]), str(entry["sha256"])
        except (KeyError, TypeError) as error:
            raise FibldmError(f"{self.root / GENERATOR} must name file and sha256 of {key}", _ASK) from error
        if not name.endswith(".safetensors"):
            raise FibldmError(f"weights must be safetensors, which hold nothing but tensors; got {name}", _ASK)
        file = inside(self.root, name)
        if (found := hash_file(file)) != expected:
            raise FibldmError(f"{file} must have the SHA-256 {expected[:12]}; it has {found[:12]}", _ASK)
        return file


@contextmanager
def open_bundle(path: str | Path, *, trust: bool = False) -> Iterator[Bundle]:
    """A bundle, from its folder or from a zip archive, which is unpacked for as long as the block lasts.

    Args:
        path: of folder or archive.
        trust: take what changed since its export, and make networks of any class that it names.

    Raises:
        FibldmError: it is no bundle of FibLDM's own layout, its files are not those of its manifest, it was written by
            a newer version, or the archive reaches out of its folder.
    """
    path = Path(path)
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise FibldmError(f"a bundle must be a folder or a zip archive; {path} is neither", "check the path")
    if path.is_dir():
        yield _read(path, trust)
        return
    with tempfile.TemporaryDirectory() as folder:
        _unpack(path, Path(folder))
        yield _read(_top(Path(folder)), trust)


def inside(root: Path, name: str) -> Path:
    """A file of a bundle.

    Raises:
        FibldmError: the name or a symbolic link leads out of the folder, or there is no such file.
    """
    wanted = PurePosixPath(name)
    if wanted.is_absolute() or ".." in wanted.parts:
        raise FibldmError(f"files of a bundle must lie in its folder; {name!r} leads out of it", _ASK)
    file = root / wanted
    if not file.resolve().is_relative_to(root.resolve()):
        raise FibldmError(f"files of a bundle must lie in its folder; {file} is a link to {file.resolve()}", _ASK)
    if not file.is_file():
        raise FibldmError(f"{file} must exist; it does not", _ASK)
    return file


def _read(root: Path, trust: bool) -> Bundle:
    if not (root / GENERATOR).exists():
        raise FibldmError(
            f"{root} must hold {GENERATOR}, which `fibldm export` writes; it does not",
            "run a bundle of another program by `python -m monai.bundle run`, if you know who made it",
        )
    facts = read_json(inside(root, GENERATOR))
    facts = current_generator(facts) if isinstance(facts, dict) else {}
    given = facts.get("format")
    if given != FORMAT:
        raise FibldmError(f"{root / GENERATOR} must have format {FORMAT}; it has {given!r}", "update FibLDM")
    if missing := sorted(KEYS - facts.keys()):
        raise FibldmError(f"{root / GENERATOR} must hold {', '.join(missing)} as well", _ASK)
    return Bundle(root, facts, trust, check_manifest(root, trust=trust, named="manifest" in facts))


def _tensors(file: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, in the types of the network, once names, shapes and types are known to fit."""
    try:
        with safe_open(file, framework="pt") as content:
            names = set(content.keys())
            _check_names(file, names, set(wanted))
            for name, tensor in wanted.items():
                part = content.get_slice(name)
                _check_tensor(file, name, tuple(part.get_shape()), part.get_dtype(), tensor)
            tensors = {name: content.get_tensor(name).to(tensor.dtype) for name, tensor in wanted.items()}
    except SafetensorError as error:
        raise FibldmError(f"{file} must be a whole safetensors file; {error}", _ASK) from error
    if strange := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise FibldmError(f"weights must be finite; {strange[0]} of {file} is not", _ASK)
    return tensors


def _check_names(file: Path, given: set[str], wanted: set[str]) -> None:
    for what, names in (("lacks", wanted - given), ("holds also", given - wanted)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise FibldmError(f"{file} must hold the weights of its network; it {what} {listed}", _ASK)


def _check_tensor(file: Path, name: str, shape: tuple[int, ...], kind: str, wanted: Tensor) -> None:
    if shape != tuple(wanted.shape):
        raise FibldmError(f"{name} of {file} must have the shape {tuple(wanted.shape)}; it has {shape}", _ASK)
    kinds = _FLOATS if wanted.is_floating_point() else _OTHERS
    if kind not in kinds:
        raise FibldmError(f"{name} of {file} must be one of {', '.join(kinds)}; it is {kind}", _ASK)


def _unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as content:
        members = content.infolist()
        for member in members:
            name = PurePosixPath(member.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts:
                raise FibldmError(f"an archive must stay in its folder; {archive} holds {member.filename!r}", _ASK)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise FibldmError(f"an archive must hold no links; {archive} has {member.filename!r}", _ASK)
        size, packed = (sum(getattr(member, kind) for member in members) for kind in ("file_size", "compress_size"))
        if size > _LARGEST_ARCHIVE or size > _LARGEST_RATIO * max(packed, 1):
            raise FibldmError(
                f"an archive must unpack to at most {_LARGEST_ARCHIVE / 2**30:g} GiB and {_LARGEST_RATIO} times its "
                f"size; {archive} says {size / 2**30:.3g} GiB, {size / max(packed, 1):.0f} times",
                _ASK,
            )
        try:
            content.extractall(folder)
        except (zipfile.BadZipFile, OSError) as error:
            raise FibldmError(f"{archive} must be a whole zip archive; {error}", _ASK) from error


def _top(folder: Path) -> Path:
    """Where the bundle begins: archives hold its files, or one folder with them."""
    inner = [part for part in folder.iterdir() if part.is_dir()]
    return folder if (folder / GENERATOR).exists() or len(inner) != 1 else inner[0]
