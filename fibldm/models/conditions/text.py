"""What is written of a patient (a finding, an impression) as a condition: a few tokens for cross-attention.

A text says little where a mask says much: it names the side of a lung, a mask its voxels. Where both are asked for, it
is there for what the mask leaves open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from fibldm.errors import FibldmError
from fibldm.files import write_tensors
from fibldm.models.conditions.condition import Case, Condition
from fibldm.models.conditions.text_encoders import (
    Embeddings,
    LocalEncoder,
    TextSource,
    key_of,
    opened,
)

TEXT = "text"
"""What the text of a case is called among what is known of it."""

_RANGE = "range.safetensors"
_SMALLEST = 1e-4  # deviation of a feature that is the same in all texts


@dataclass(frozen=True)
class TextEncoding(Condition):
    """A text as tokens ``(T, W)`` of a text encoder, or as their numbers where the encoder is trained.

    Encoded it is ``(B, T, W + 1)`` or ``(B, T, 2)``: the last of a token is 1 where there is one, and 0 behind the end
    of the text. Such a row, and all of an unknown text, is 0.

    Attributes:
        tokens: the most that a text may have.
        width: of the tokens, as the encoder makes them.
        encoder: its fingerprint.
        name: its name.
        licence: of its weights; empty where nothing says it.
        texts: how many different ones training had.
        reach: cosine distance to the nearest text of training beyond which a text is out of range.
        trained: of an encoder that is trained, its configuration; None of one that stays as it is.
    """

    tokens: int
    width: int
    encoder: str
    name: str = field(compare=False)
    licence: str = field(compare=False)
    texts: int
    reach: float
    trained: Mapping[str, Any] | None = None
    _source: TextSource | None = field(init=False, repr=False, compare=False, default=None)
    _known: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _vectors: Tensor | None = field(init=False, repr=False, compare=False, default=None)

    what = "a text"

    @classmethod
    def fit(
        cls,
        encoder: str | Path | None,
        cases: Mapping[str, Mapping[str, object]],
        others: Mapping[str, Mapping[str, object]] | None = None,
        *,
        tokens: int = 64,
        trained: bool = False,
        reach: float = 0.99,
        licence: str | None = None,
        kept: str | Path | None = None,
    ) -> "TextEncoding":
        """As the training cases have them.

        Args:
            encoder: folder or file, see `opened`.
            cases: what is known of each training case, by its name.
            others: the same of further cases, whose texts are made ready as well.
            tokens: see the class.
            trained: the network trains the encoder, too.
            reach: share of the training texts that would be in range if each were asked for and the others were there.
            licence: of the encoder; None takes what its folder says.
            kept: a folder that keeps the tokens of all these texts, so that each is encoded once; None keeps nothing.

        Raises:
            FibldmError: there is no such encoder, it cannot be trained, or the cases have no two texts, or texts that
                are too long, or some of which there are no embeddings.
        """
        source = _source_of(encoder, trained)
        if not 0 < reach <= 1:
            raise FibldmError(f"text_reach must be a share above 0, up to 1; got {reach}", "0.99 is usual")
        of_training = _texts(source, cases)
        known = _kept_tokens(source, [*of_training, *_texts(source, others or {})], kept)
        _check_length(known, tokens)
        if len(of_training) < 2:
            raise FibldmError(
                f"training cases must have texts that differ; {len(cases)} cases have {len(of_training) or 'none'}",
                "fibldm prepare --text COLUMN, or --text beside for .txt files beside the images; then encode again",
            )
        vectors = torch.stack([_vector(known[key_of(text)]) for text in of_training])
        width = next(iter(known.values())).shape[1]
        made = cls(
            tokens,
            width,
            source.fingerprint,
            source.name,
            source.licence if licence is None else licence,
            len(of_training),
            _leave_one_out(vectors, reach),
            source.architecture if trained and isinstance(source, LocalEncoder) else None,
        )
        return made._with(source, known, vectors)

    @property
    def fingerprint(self) -> str:
        return self.encoder

    @property
    def beginning(self) -> Mapping[str, Tensor] | None:
        """Weights that an encoder which is trained begins with; None in a bundle, where the network's have them."""
        return self._source.model.state_dict() if isinstance(self._source, LocalEncoder) else None

    @property
    def parts(self) -> tuple[str, ...]:
        return (TEXT,)

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation ``(W,)`` of the tokens of all texts it was fitted to; 0 and 1 where it was not."""
        if not self._known or self.trained is not None:
            return torch.zeros(self.width), torch.ones(self.width)
        all_of_them = torch.cat([part for _, part in sorted(self._known.items())])
        return all_of_them.mean(dim=0), all_of_them.std(dim=0, unbiased=False).clamp_min(_SMALLEST)

    def shape(self, cells: Sequence[int]) -> tuple[int, ...]:
        return (self.tokens, 2 if self.trained is not None else self.width + 1)

    def read(self, asked: Any) -> str | None:
        """The text with single spaces.

        Raises:
            FibldmError: it is no text, is empty or too long, or there is no embedding of it.
        """
        if asked is None:
            return None
        text = plain_text(asked) if isinstance(asked, str) else ""
        if not text:
            got = "no word" if isinstance(asked, str) else f"a {type(asked).__name__}"
            raise FibldmError(f"{self.what} must be words; got {got}", "leave it out to ask for nothing")
        _check_length({"": self._tokens(text)}, self.tokens)
        return text

    def outside(self, value: str | None) -> list[str]:
        if value is None or self._vectors is None:
            return []
        distance = 1 - float((self._vectors @ _vector(self._tokens(value))).max())
        if distance <= self.reach + 1e-6:
            return []
        return [f"the text is {distance:.3f} from the nearest of training, those up to {self.reach:.3f} from another"]

    def encode(self, values: Sequence[object]) -> Tensor:
        """``(B, T, W + 1)``, or ``(B, T, 2)`` of an encoder that is trained."""
        return torch.stack([self._rows(self.read(value)) for value in values])

    def own(self, known: Mapping[str, object]) -> str | None:
        return plain_text(str(known.get(TEXT) or "")) or None

    def encode_case(self, case: Case) -> Tensor:
        return self._rows(None if self._source is None else _text_of(self._source, case.name, case.known))

    def drop_(self, encoded: Tensor, dropped: Tensor) -> Tensor:
        return encoded.masked_fill_(dropped[..., None], 0.0)

    def recorded(self, value: str | None) -> dict[str, str] | None:
        """The text, and what encoded it."""
        return None if value is None else {"text": value, "encoder": self.name, "encoder_sha256": self.encoder}

    def told(self, value: str | None) -> str:
        """Its length and the beginning of its SHA-256: logs are read by others than reports are."""
        return "unknown" if value is None else f"{len(value)} characters (SHA-256 {key_of(value)[:12]}...)"

    def facts(self) -> dict[str, Any]:
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "reach": round(self.reach, 4),
            "encoder": self.name,
            "encoder_sha256": self.encoder,
            "encoder_licence": self.licence,
            "kind": self._kind,
        }

    @property
    def _kind(self) -> str:
        if self.trained is not None:
            return "trained encoder"
        return "embeddings" if isinstance(self._source, Embeddings) else "encoder"

    def write(self, folder: Path) -> None:
        if self._source is None or self._vectors is None:
            raise FibldmError("a text condition must have been fitted to be written; this one was not")
        self._source.write(folder)
        write_tensors(folder / _RANGE, {"vectors": self._vectors.half()})

    def loaded(self, folder: Path) -> "TextEncoding":
        source = opened(folder)
        if source.fingerprint != self.encoder:
            raise FibldmError(
                f"{folder} must hold the text encoder {self.name} that training had ({self.encoder[:12]}); it holds "
                f"another one ({source.fingerprint[:12]})",
                "ask for the bundle again, or export it again",
            )
        source.load()  # the folder may be gone when the first text is asked for
        vectors = F.normalize(load_file(folder / _RANGE)["vectors"].float(), dim=1)
        return replace(self)._with(source, {}, vectors)

    def _with(self, source: TextSource, known: dict[str, Tensor], vectors: Tensor) -> "TextEncoding":
        for name, value in (("_source", source), ("_known", known), ("_vectors", vectors)):
            object.__setattr__(self, name, value)
        return self

    def _tokens(self, text: str) -> Tensor:
        key = key_of(text)
        if key not in self._known:
            if self._source is None:
                raise FibldmError("a text needs its encoder, which was not loaded", "load the bundle or run again")
            self._known[key] = self._source.tokens(text)
        return self._known[key]

    def _rows(self, text: str | None) -> Tensor:
        rows = torch.zeros(self.shape(()))
        if text is None:
            return rows
        if self.trained is not None and isinstance(self._source, LocalEncoder):
            given = torch.tensor(self._source.ids(text), dtype=torch.float32)[:, None]
        else:
            given = self._tokens(text)
        rows[: len(given), :-1] = given
        rows[: len(given), -1] = 1.0
        return rows


def plain_text(text: str) -> str:
    """A text with single spaces in place of lines, tabs and the like."""
    return " ".join(text.split())


def _source_of(encoder: str | Path | None, trained: bool) -> TextSource:
    if encoder is None:
        raise FibldmError(
            "texts need an encoder; text_encoder says none",
            "--set text_encoder=FOLDER of an encoder on this machine, or a .npz or .safetensors file of embeddings",
        )
    source = opened(encoder)
    if trained and not isinstance(source, LocalEncoder):
        raise FibldmError(f"embeddings cannot be trained; {source.name} holds some", "leave text_trained out")
    return source


def _text_of(source: TextSource, name: str, known: Mapping[str, object]) -> str | None:
    """What a case is asked with: its text, or where there are only embeddings by case its name; None is unknown."""
    given = known.get(TEXT)
    text = "" if given is None else plain_text(str(given))
    if isinstance(source, LocalEncoder):
        return text or None
    return next((key for key in (text, name) if key and source.knows(key)), None)


def _texts(source: TextSource, cases: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The different texts of cases.

    Raises:
        FibldmError: some have no embedding.
    """
    found = {name: _text_of(source, name, known) for name, known in cases.items()}
    if lost := [name for name, text in found.items() if text is None and cases[name].get(TEXT) is not None]:
        raise FibldmError(
            f"every text must have an embedding in {source.name}; {len(lost)} of {len(cases)} cases have none, the "
            f"first is {lost[0]}",
            "add them, or leave these cases without a text",
        )
    return sorted({text for text in found.values() if text is not None})


def _kept_tokens(source: TextSource, texts: Sequence[str], kept: str | Path | None) -> dict[str, Tensor]:
    """The tokens of texts, by `key_of`."""
    file = None if kept is None else Path(kept) / f"texts_{source.fingerprint[:16]}.safetensors"
    there = load_file(file) if file is not None and file.is_file() else {}
    known = {key_of(text): there[key_of(text)] if key_of(text) in there else source.tokens(text) for text in texts}
    if file is not None and file.parent.is_dir() and known.keys() - there.keys():
        write_tensors(file, {**there, **known})
    return known


def _check_length(known: Mapping[str, Tensor], most: int) -> None:
    if long := [len(part) for part in known.values() if len(part) > most]:
        came = f"{len(long)} of {len(known)} have more, up to {max(long)}" if len(known) > 1 else f"got {max(long)}"
        raise FibldmError(
            f"a text must have at most {most} tokens; {came}",
            "shorten it, to the findings or the impression of a report; nothing is cut off. Training takes longer ones "
            f"with --set text_tokens={max(long)}",
        )


def _vector(tokens: Tensor) -> Tensor:
    return F.normalize(tokens.mean(dim=0), dim=0)


def _leave_one_out(vectors: Tensor, share: float) -> float:
    """The distance to the nearest of the others that a share of them keeps."""
    distances = 1 - vectors @ vectors.T
    return float(distances.fill_diagonal_(torch.inf).min(dim=1).values.clamp_min(0).quantile(share))
