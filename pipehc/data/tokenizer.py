"""Tokenizers: raw bytes, or a Hugging Face `tokenizers` JSON file."""

import difflib
import hashlib
import json
import os
import re
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

    def __init__(self, path: Path, end_of_document: str | None = None) -> None:
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
        # A file can ask to cut or pad what it encodes, or to split words at random; a corpus must stay whole, and the same.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None) is not None:
            self._tokenizer.model.dropout = None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"data.tokenizer: {str(path)!r} has an empty vocabulary; allowed: bytes, or a file with tokens")
        self.name = str(path)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.end_of_document = _end_of_document(path, vocabulary, end_of_document)
        self.fingerprint = hashlib.blake2b(content + str(self.end_of_document).encode(), digest_size=16).hexdigest()
        self._may_drop = _may_drop(self._tokenizer.model, vocabulary)
        added = sorted((token.content for token in self._tokenizer.get_added_tokens_decoder().values()), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added))) if added else None  # found in the text as they are

    def encode(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        # Batches let the library use its threads; bounded ones keep few of its large result objects alive.
        for group in batched(documents, 64):
            texts = [document.decode("utf-8", errors="replace") for document in group]
            try:
                encodings = self._encode(texts)
            except Exception:
                encodings = None
            if encodings is not None and not self._may_drop:
                yield from encodings
                continue
            for text in texts:  # one by one: those before the one at fault can be counted
                self._check_words(text)
                try:
                    yield from self._encode([text])
                except Exception as error:
                    raise ValueError(f"data.tokenizer: {self.name!r} cannot encode the text: {error}") from None

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _check_words(self, text: str) -> None:
        """Raises ValueError naming the first word that has no tokens, or not for all of it."""
        tokenizer, model = self._tokenizer, self._tokenizer.model
        words: dict[str, None] = {}  # in order, each once
        for part in self._added.split(text) if self._added else [text]:
            if tokenizer.normalizer is not None:
                part = tokenizer.normalizer.normalize_str(part)
            split = [(part, None)] if tokenizer.pre_tokenizer is None else tokenizer.pre_tokenizer.pre_tokenize_str(part)
            words |= dict.fromkeys(word for word, _ in split)
        for word in words:
            why = ""
            try:
                tokens = model.tokenize(word)
            except Exception as error:  # the library knows no other kind
                tokens, why = [], f": {error}"
            covered = sum(end - start for start, end in (token.offsets for token in tokens))
            if covered < len(word.encode()):
                shown = word if len(word) <= 40 else f"{word[:40]}..."
                raise ValueError(f"data.tokenizer: {self.name!r} has no token for {shown!r}{why}; must have an unknown token, or "
                                 "tokens for all of the text")


def open_tokenizer(name: str, end_of_document: str | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `bytes` or the path of a JSON file. ValueError when it cannot be read.

    end_of_document: the token that ends a document, of a JSON file; None: what the file, or its neighbour, says.
    """
    if name == "bytes":
        return ByteTokenizer()
    return HuggingFaceTokenizer(Path(os.path.expanduser(name)), end_of_document)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    for dtype in (np.uint8, np.uint16):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return dtype
    return np.uint32


def _end_of_document(path: Path, vocabulary: dict[str, int], wish: str | None) -> int | None:
    """Id of the token that ends a document: `wish`, what the tokenizer_config.json beside the file says, or a well-known name."""
    if wish is not None:
        if wish not in vocabulary:
            near = difflib.get_close_matches(wish, vocabulary, 3) or sorted(vocabulary, key=lambda name: -vocabulary[name])[:3]
            raise ValueError(f"data.end_of_document: {wish!r} is no token of {str(path)!r}; must be one, for example "
                             f"{', '.join(map(repr, near))}")
        return vocabulary[wish]
    names: tuple[Any, ...] = END_OF_DOCUMENT_NAMES
    try:
        declared = json.loads(path.with_name("tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        names = (declared["content"] if isinstance(declared, dict) else declared, *names)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the file is optional, and so is the entry
    return next((vocabulary[name] for name in names if isinstance(name, str) and name in vocabulary), None)


def _may_drop(model: Any, vocabulary: dict[str, int]) -> bool:
    """Whether characters can vanish without a word: byte-pair encoding leaves out what it has no token for.

    Not with an unknown token, nor with a token for every byte, written as one of 256 characters or as <0x00> to <0xFF>.
    """
    if type(model).__name__ != "BPE" or model.unk_token is not None:
        return False
    if model.byte_fallback:
        return not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    from tokenizers.pre_tokenizers import ByteLevel

    return not all(character in vocabulary for character in ByteLevel.alphabet())
