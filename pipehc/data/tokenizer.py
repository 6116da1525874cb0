"""Tokenizers: raw bytes, or a Hugging Face `tokenizers` JSON file."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# What widely used models call the token between documents, tried in this order when no tokenizer_config.json names one.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]", "<|eos|>")


class Tokenizer(Protocol):
    """Turns documents into token ids below `vocab_size`.

    `end_of_document` follows every document (None: documents are simply joined). `fingerprint` changes when the ids of some text
    would. `slow` says that results are worth keeping on disk.
    """

    name: str
    vocab_size: int
    end_of_document: int | None
    fingerprint: str
    slow: bool

    def encode(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """One 1-D array of unsigned ids a document, in order, without the end-of-document token."""


class ByteTokenizer:
    """A byte is a token. Byte 0 ends a document, so documents must not contain it."""

    name = "bytes"
    vocab_size = 256
    end_of_document: int | None = 0
    fingerprint = "bytes"
    slow = False

    def encode(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        for document in documents:
            yield np.frombuffer(document, dtype=np.uint8)


class HuggingFaceTokenizer:
    """A `tokenizer.json`; bytes that are not UTF-8 become U+FFFD. No special token is added but the end of a document."""

    slow = True

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers  # an optional dependency
        except ImportError:
            raise ValueError(f"data.tokenizer: {str(path)!r} needs the package `tokenizers`, which is not installed "
                             "(pip install tokenizers); `bytes` needs nothing") from None
        try:
            content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise ValueError(f"data.tokenizer: cannot read {str(path)!r}: {error}; "
                             "allowed: bytes, or the path of a Hugging Face tokenizers JSON file") from None
        # A file can ask to cut or pad what it encodes; a corpus must stay whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"data.tokenizer: {str(path)!r} has an empty vocabulary")
        self.name = str(path)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.end_of_document = _end_of_document(path, vocabulary)
        self.fingerprint = hashlib.blake2b(content + str(self.end_of_document).encode(), digest_size=16).hexdigest()

    def encode(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        # Batches let the library use its threads; bounded ones keep few of its large result objects alive.
        for group in batched(documents, 64):
            texts = [document.decode("utf-8", errors="replace") for document in group]
            for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                yield np.asarray(encoding.ids, dtype=np.uint32)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `bytes` or the path of a JSON file. ValueError when it cannot be read."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(Path(os.path.expanduser(name)))


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    for dtype in (np.uint8, np.uint16):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return dtype
    return np.uint32


def _end_of_document(path: Path, vocabulary: dict[str, int]) -> int | None:
    """Id of the token that ends a document: what the tokenizer_config.json beside the file says, else a well-known name."""
    names: tuple[Any, ...] = END_OF_DOCUMENT_NAMES
    try:
        declared = json.loads(path.with_name("tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        names = (declared["content"] if isinstance(declared, dict) else declared, *names)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the file is optional, and so is the entry
    return next((vocabulary[name] for name in names if isinstance(name, str) and name in vocabulary), None)
