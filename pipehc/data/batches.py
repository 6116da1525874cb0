"""Training data: fixed-length samples, their order, and where they come from.

Everything is a pure function of the configuration and the sample's number in the run: any process can draw any sample, so each
end of a pipeline draws its own, and a resumed run continues with exactly the sample that is due.
"""

import hashlib
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipehc.data.retrieval import Retrieval
from pipehc.data.text import Document, read_documents, tokenize
from pipehc.data.tokenizer import Tokenizer, open_tokenizer

_WORD = 2**64 - 1


class Split(Protocol):
    """Samples of `sequence_length + 1` tokens, 1-D int64; or, with labels of their own, (tokens, labels), `sequence_length` each.

    Labels below 0 do not count. A split that has such has an attribute `counted_per_sample`: how many of a sample's labels do, in
    every sample the same; see `counted_labels`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]: ...


class DataInfo(NamedTuple):
    """What was opened. `fingerprint` differs when the samples differ: compare it between ranks and with a checkpoint's.

    `held_out` says how validation was chosen: 'documents' (whole ones), 'tail' (the end of the text, for want of documents to
    choose from), 'stream' (samples are made, for either side its own) or 'nothing'. `skipped` names files that were left out and
    why. `joined`: no token stands between documents. `vocabulary` differs when the numbers of tokens mean something else (None:
    tokenized elsewhere, nobody knows).
    """

    tokenizer: str
    documents: int
    train_samples: int
    validation_samples: int
    held_out: str
    skipped: tuple[str, ...]
    fingerprint: str
    joined: bool = False
    vocabulary: str | None = None


class Splits(NamedTuple):
    train: Split
    validation: Split
    info: DataInfo


class Windows:
    """Samples of a token stream: number i is tokens[i * s : i * s + s + 1], so that every token but the first is a label once."""

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        self._tokens = tokens
        self._stride = sequence_length

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self._stride)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self._stride
        return torch.from_numpy(self._tokens[start : start + self._stride + 1].astype(np.int64))


class Sampler:
    """Which sample is the k-th of a run: every epoch visits each of `length` samples once, in an order of its own.

    A pure function of (length, seed, k) in constant memory and some microseconds. The order is a Feistel network over Z_a x Z_b
    with a * b just above `length` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", generalised Feistel); what
    falls outside is sent through again until it falls inside. It depends on no library's random stream, hence on no version.
    """

    ROUNDS = 8

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"a sampler needs at least one sample, got {length}")
        self._length = length
        self._seed = seed
        self._a = isqrt(length - 1) + 1
        self._b = -(-length // self._a)

    def __len__(self) -> int:
        """Samples of one epoch."""
        return self._length

    def index(self, k: int) -> int:
        """The sample drawn as the k-th (from 0) of the run."""
        epoch, position = divmod(k, self._length)
        digest = hashlib.blake2b(f"{self._seed} {epoch}".encode(), digest_size=8 * self.ROUNDS).digest()
        keys = [int.from_bytes(digest[i : i + 8]) for i in range(0, len(digest), 8)]
        while True:
            position = self._permute(position, keys)
            if position < self._length:
                return position

    def _permute(self, position: int, keys: list[int]) -> int:
        left, right = divmod(position, self._b)
        for i in range(0, len(keys), 2):
            left = (left + _mix(right ^ keys[i])) % self._a
            right = (right + _mix(left ^ keys[i + 1])) % self._b
        return left * self._b + right


def batch(split: Split, sampler: Sampler, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Samples first ... first + count - 1 of the run: inputs, and labels (the next tokens, unless the split brings others), int64
    [count, sequence_length]."""
    samples = [split[sampler.index(k)] for k in range(first, first + count)]
    tokens, labels = zip(*((s[:-1], s[1:]) if isinstance(s, Tensor) else s for s in samples))
    return torch.stack(tokens), torch.stack(labels)


def counted_labels(split: Split | None) -> int | None:
    """How many labels of a sample count for the loss; None: all of them."""
    return getattr(split, "counted_per_sample", None)


def open_splits(
    *,
    kind: str,
    paths: Sequence[str],
    suffixes: Sequence[str],
    tokenizer: str,
    validation_fraction: float,
    sequence_length: int,
    vocab_size: int,
    seed: int,
    cache: Path,
    end_of_document: str | None = None,
    pairs: int = 8,
) -> Splits:
    """Open the data of a run; every rank calls it, and all get the same samples. Arguments have the names of the configuration.

    `kind` text: see `pipehc.text.read_documents`; each document is held out for validation as a whole with probability
    `validation_fraction`, decided by its content. `kind` megatron: `paths` are prefixes of .bin/.idx files, which are tokenized
    already; `seed` orders their documents. `kind` retrieval: samples of `pairs` pairs, see `pipehc.data.retrieval`, of `seed` and
    `sequence_length` alone. `cache` is a folder for derived files, shared by all ranks.
    ValueError names the key at fault: a path, a tokenizer, tokens that `model.vocab_size` does not cover, too little text.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"data.validation_fraction: {validation_fraction} is not allowed; allowed: 0 <= fraction < 1")
    if kind == "retrieval":
        made, other = (Retrieval(seed, side, pairs, sequence_length) for side in ("training", "validation"))
        info = DataInfo("none: made as tokens", 0, len(made), len(other), "stream", (), f"{made.digest()} {other.digest()}")
        return Splits(made, other, info)
    if kind == "megatron":
        from pipehc.megatron.trainer.data import open_indexed  # imports Megatron: seconds that a text run need not spend twice

        indexed = open_indexed(paths, validation_fraction, sequence_length, vocab_size, seed, cache)
        how = "documents" if validation_fraction else "nothing"
        info = DataInfo("none: indexed tokens", indexed.documents, len(indexed.train), len(indexed.validation), how, (),
                        indexed.fingerprint)
        return Splits(indexed.train, indexed.validation, info)
    if kind != "text":
        raise ValueError(f"data.kind: {kind!r} is not allowed; allowed: text, megatron, retrieval")
    vocabulary = open_tokenizer(tokenizer, end_of_document)
    return _open_text(paths, suffixes, vocabulary, validation_fraction, sequence_length, vocab_size, cache)


def _open_text(paths: Sequence[str], suffixes: Sequence[str], vocabulary: Tokenizer, validation_fraction: float,
               sequence_length: int, vocab_size: int, cache: Path) -> Splits:
    documents, skipped = read_documents(paths, suffixes)
    held_out = [_is_held_out(document, validation_fraction) for document in documents]
    train, validation = (tokenize([document for document, out in zip(documents, held_out) if out is side], vocabulary, cache)
                         for side in (False, True))
    how = "documents" if validation_fraction else "nothing"
    need = sequence_length + 1
    if validation_fraction and min(len(train), len(validation)) < need:
        # Few or large documents: one side got next to nothing. Its remains are less than a sample.
        how = "tail"
        text = max(train, validation, key=len)
        cut = len(text) - round(len(text) * validation_fraction)
        train, validation = text[:cut], text[cut:]
    for name, tokens in [("training", train)] + ([("validation", validation)] if validation_fraction else []):
        if len(tokens) < need:
            raise ValueError(f"data.paths: too little text: {len(tokens)} tokens for {name}, but one sample takes {need} "
                             f"(train.sequence_length {sequence_length} + 1); data.validation_fraction is {validation_fraction}, "
                             f"{len(documents)} documents were read")
        if (top := int(tokens.max())) >= vocab_size:
            raise ValueError(f"model.vocab_size: {vocab_size} is too small: data.tokenizer {vocabulary.name!r} gives {top} in the "
                             f"{name} text; allowed: at least {top + 1}")
    splits = Windows(train, sequence_length), Windows(validation, sequence_length)
    fingerprint = hashlib.blake2b(f"{vocabulary.fingerprint} {validation_fraction} {sequence_length}".encode(), digest_size=16)
    for document in documents:
        fingerprint.update(document.digest)
    info = DataInfo(vocabulary.name, len(documents), len(splits[0]), len(splits[1]), how, tuple(skipped), fingerprint.hexdigest(),
                    vocabulary.end_of_document is None, vocabulary.fingerprint)
    return Splits(*splits, info)


def _is_held_out(document: Document, fraction: float) -> bool:
    """By content: every process and machine decides alike, wherever the files lie, and copies of a file stay on one side."""
    return int.from_bytes(document.digest[:8]) < fraction * 2**64


def _mix(word: int) -> int:
    """A bijection on 64 bits whose every output bit depends on every input bit (finaliser of SplitMix64, Steele et al. 2014)."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
