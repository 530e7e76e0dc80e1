"""How a text becomes tokens: an encoder in a folder of this machine, or embeddings that somebody computed before.

Nothing is ever downloaded, no code of a folder is run, and of weights only safetensors are read.
"""

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.files import hash_file, hash_value, read_json, write_tensors

EMBEDDINGS = (".npz", ".safetensors")

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
_WORDS = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_KEPT = "embeddings.safetensors"
_HASH = re.compile(r"[0-9a-f]{64}")


def key_of(text: str) -> str:
    """What a text is known by where it must not be told: its SHA-256."""
    return sha256(text.encode()).hexdigest()


class TextSource(ABC):
    """Makes tokens of texts.

    Attributes:
        name: of folder or file.
        fingerprint: SHA-256 of all that decides the tokens.
        licence: as the folder says it; empty where it says nothing.
    """

    name: str
    fingerprint: str
    licence: str = ""

    @abstractmethod
    def knows(self, text: str) -> bool:
        """Whether there are tokens of a text."""

    @abstractmethod
    def tokens(self, text: str) -> Tensor:
        """``(T, W)``, float32, on the CPU, of a text by itself: the same in any batch and on any device."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write all that `opened` needs into a folder, which holds no text in the clear."""

    def load(self) -> None:  # noqa: B027
        """Read all of it, so that its files are not needed any more."""


class Embeddings(TextSource):
    """Tokens that were computed before, by text or by case.

    Args:
        file: ``.npz`` or ``.safetensors`` with an array ``(T, W)``, or ``(W,)`` for a single token, by text or case.

    Raises:
        FibldmError: the file is missing or holds something else.
    """

    def __init__(self, file: Path) -> None:
        self.name = file.name
        arrays = {key if _HASH.fullmatch(key) else key_of(key): part for key, part in _arrays(file).items()}
        self.arrays = {key: torch.atleast_2d(part.float()) for key, part in sorted(arrays.items())}
        widths = {part.shape[-1] for part in self.arrays.values()}
        if len(widths) != 1 or any(part.ndim != 2 or not part.isfinite().all() for part in self.arrays.values()):
            raise FibldmError(
                f"{file} must hold finite arrays (tokens, width) of one width, one for each text; "
                f"got {len(self.arrays)} arrays of the widths {sorted(widths)}"
            )
        self.fingerprint = hash_value({key: hash_value(part.tolist()) for key, part in self.arrays.items()})

    def knows(self, text: str) -> bool:
        return key_of(text) in self.arrays

    def tokens(self, text: str) -> Tensor:
        if not self.knows(text):
            raise FibldmError(
                f"a text must be one of the {len(self.arrays)} that {self.name} has embeddings of; this one is not",
                "ask with the very words, or train with an encoder, which takes any text",
            )
        return self.arrays[key_of(text)]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / _KEPT, self.arrays)


class LocalEncoder(TextSource):
    """A text encoder and its tokenizer in a folder, as Hugging Face's transformers save them.

    Args:
        folder: with ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Raises:
        FibldmError: files are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        names = sorted(file.name for file in folder.iterdir() if file.is_file())
        weights = [name for name in names if _WEIGHTS.fullmatch(name) or name == _INDEX]
        tokenizer = [name for name in names if name in _TOKENIZER]
        parts = {_CONFIG: _CONFIG in names, "model.safetensors": weights, "a tokenizer": tokenizer}
        if missing := [what for what, there in parts.items() if not there]:
            raise FibldmError(
                f"a text encoder's folder must hold config.json, model.safetensors and a tokenizer; {folder} lacks "
                f"{', '.join(missing)}",
                "save it with model.save_pretrained(FOLDER) and tokenizer.save_pretrained(FOLDER)",
            )
        self.files = [_CONFIG, *weights, *tokenizer]
        self.words = [name for name in names if name in _WORDS]
        self.fingerprint = hash_value({name: hash_file(folder / name) for name in self.files})
        self.licence = _licence(folder / "README.md") if "README.md" in names else ""

    @property
    def architecture(self) -> dict[str, Any]:
        """Its configuration as plain values, without what names places or code."""
        content: dict[str, Any] = read_json(self.folder / _CONFIG)
        return {key: value for key, value in content.items() if key not in ("_name_or_path", "auto_map")}

    def knows(self, text: str) -> bool:
        return True

    def load(self) -> None:
        _ = self.tokenizer, self.model

    def ids(self, text: str) -> list[int]:
        """Numbers of the tokens, with those at the beginning and the end."""
        return [int(number) for number in self.tokenizer(text, truncation=False)["input_ids"]]

    @torch.no_grad()
    def tokens(self, text: str) -> Tensor:
        ids = torch.tensor([self.ids(text)])
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and ids.shape[1] > longest:
            raise FibldmError(
                f"a text must have at most {longest} tokens, as {self.name} takes no more; this one has {ids.shape[1]}",
                "shorten it, to the findings or the impression of a report",
            )
        return last_states(self.model, ids, torch.ones_like(ids))[0]

    @cached_property
    def tokenizer(self) -> Any:
        loaded = _transformers().AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        loaded.model_max_length = int(1e9)  # lengths are checked, not warned of
        return loaded

    @cached_property
    def model(self) -> nn.Module:
        module = _transformers().AutoModel.from_pretrained(
            str(self.folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        return encoding_part(module, self.name)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*self.files, *self.words):
            shutil.copyfile(self.folder / name, folder / name)


def opened(place: str | Path) -> TextSource:
    """An encoder's folder, or a file of embeddings.

    Raises:
        FibldmError: it is neither; nothing is downloaded in its place.
    """
    path = Path(place)
    if path.is_dir():
        return Embeddings(path / _KEPT) if (path / _KEPT).is_file() else LocalEncoder(path)
    if path.suffix in EMBEDDINGS and path.is_file():
        return Embeddings(path)
    raise FibldmError(
        f"a text encoder must be a folder of this machine, or a .npz or .safetensors file of embeddings; {place} is "
        "none, and nothing is downloaded",
        f"where that is a name on Hugging Face: `hf download {place} --local-dir {path.name}`, and give the folder",
    )


def module_of(architecture: Mapping[str, Any]) -> nn.Module:
    """An encoder with random weights.

    Raises:
        FibldmError: transformers does not know such a one.
    """
    transformers, kind = _transformers(), str(architecture.get("model_type"))
    more = {key: value for key, value in architecture.items() if key != "model_type"}
    try:
        module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **more))
    except (KeyError, ValueError, TypeError) as error:
        raise FibldmError(f"transformers must know the text encoder {kind!r}; {error}") from error
    return encoding_part(module.float(), kind)


def encoding_part(module: Any, name: str) -> nn.Module:
    """What of a model makes tokens of texts, without dropout, which would draw from nobody's generator.

    Raises:
        FibldmError: it does not say which part that is.
    """
    if getattr(module.config, "is_encoder_decoder", False):
        module = module.get_encoder()
    if hasattr(module, "text_model"):
        module = module.text_model
    if not hasattr(module, "get_input_embeddings") or module.get_input_embeddings() is None:
        raise FibldmError(f"{name} must be an encoder of texts; {type(module).__name__} takes none")
    if getattr(module, "pooler", None) is not None:
        module.pooler = None  # is never looked at, and would be weights without a gradient
    part: nn.Module = module
    return part.eval()


def last_states(module: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Tokens ``(B, T, W)`` of ids ``(B, T)``; what the mask has as 0 counts for nothing."""
    states: Tensor = module(input_ids=ids, attention_mask=mask).last_hidden_state
    return states


def _arrays(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with np.load(file, allow_pickle=False) as content:
            return {name: torch.from_numpy(np.asarray(content[name])) for name in content.files}
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise FibldmError(f"{file} must be a file of embeddings, .npz or .safetensors; {error}") from error


def _licence(readme: Path) -> str:
    """What the front matter of a model card says."""
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except yaml.YAMLError:
        return ""
    return str(front.get("license") or "") if isinstance(front, dict) else ""


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise FibldmError(
            "text encoders need the package transformers, which is not installed",
            'pip install "fibldm[text]"; embeddings that were computed before need none',
        ) from error
    transformers.utils.logging.disable_progress_bar()  # of reading a file
    return transformers
