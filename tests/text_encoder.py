"""Text encoders for tests: embeddings that anybody can make, and a BERT of random weights, made by transformers."""

import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WIDTH = 12


def embedded(text: str) -> NDArray[np.float32]:
    """A token ``(T, WIDTH)`` for each word, the same for the same word."""
    seeds = [int(sha256(word.encode()).hexdigest()[:8], 16) for word in re.findall(r"\w+", text.lower())]
    return np.stack([np.random.default_rng(seed).standard_normal(WIDTH) for seed in seeds]).astype(np.float32)


def write_embeddings(file: Path, texts: Iterable[str]) -> Path:
    """A ``.npz`` of texts."""
    np.savez(file, **{text: embedded(text) for text in texts})
    return file


def write_bert(folder: Path, texts: Iterable[str]) -> Path:
    """A BERT of two layers and random weights, with a tokenizer that knows the words of some texts."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    BertModel(BertConfig(vocab_size=len(words) + 5, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\nRandom.\n")
    return folder
