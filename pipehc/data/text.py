"""Text files as documents, and documents as one stream of tokens."""

import fcntl
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np

from pipehc.data.tokenizer import Tokenizer, token_dtype

# Every process holds the text, so more than this belongs into an indexed (memory-mapped) data set.
MAX_BYTES = 2 << 30

# Left out of the default corpus: what is not the standard library, and its test suites, which many distributions do not ship.
_STANDARD_LIBRARY_SKIPS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class Document(NamedTuple):
    """One file. `digest` is 16 bytes of its content's hash: names and locations do not matter, equal files are equal."""

    name: str
    content: bytes
    digest: bytes


def read_documents(paths: Sequence[str], suffixes: Sequence[str]) -> tuple[list[Document], list[str]]:
    """Documents of `paths` in a fixed order, and the names of files skipped, each with its reason.

    A path is a file (whatever its suffix) or a folder, searched recursively for names that end in one of `suffixes`; hidden
    folders and `__pycache__` are passed over. No paths: the Python sources of the running interpreter's standard library, without
    its tests. In folders, empty, unreadable and binary files (those with a zero byte) are skipped; a file named itself must be
    readable text.
    ValueError: a path that does not exist or cannot be read, no text at all, or more than 2 GiB of it.
    """
    files = _find(paths, suffixes)
    size = sum(_size(file) for _, file, _ in files)
    if size > MAX_BYTES:
        raise ValueError(f"data.paths: {list(paths)} hold {size / 2**30:.1f} GiB of text; "
                         f"allowed: at most {MAX_BYTES / 2**30:g} GiB; index more than that once (tools/make_indexed.py), "
                         "then use data.kind: megatron")
    documents: list[Document] = []
    skipped: list[str] = []
    for name, file, named in files:
        try:
            content = file.read_bytes()
            problem = "binary (contains a zero byte)" if b"\0" in content else None if content else "empty"
        except OSError as error:
            problem = error.strerror or str(error)
        if problem is None:
            documents.append(Document(name, content, hashlib.blake2b(content, digest_size=16).digest()))
        elif named:
            raise ValueError(f"data.paths: {str(file)!r} is {problem}; allowed: readable text files and folders of them")
        else:
            skipped.append(f"{name}: {problem}")
    if not documents:
        raise ValueError(f"data.paths: {list(paths)} hold no text file whose name ends in one of data.suffixes: {list(suffixes)} "
                         f"({len(skipped)} skipped as empty, unreadable or binary)")
    return documents, skipped


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """The documents' tokens in order, each document followed by the end-of-document token: 1-D, smallest unsigned type.

    A slow tokenizer's result is kept in the folder `cache`, named by a hash of tokenizer and contents, and memory-mapped from
    there: the processes of a machine share its pages. Safe to call from several processes at once: one works, the others wait.
    ValueError: the folder cannot be written, or the tokenizer has no token for something.
    """
    if not tokenizer.slow:
        return _encode(documents, tokenizer)
    key = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=16)
    for document in documents:
        key.update(document.digest)
    file = cache / f"tokens-{key.hexdigest()}.npy"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # The lock only spares work: nobody sees half a file in any case, as it appears by a rename. It goes with its process.
        with open(file.with_suffix(".lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                _save(_encode(documents, tokenizer), file)
        return np.load(file, mmap_mode="r")
    except OSError as error:
        raise ValueError(f"run.folder: cannot keep tokenized text in {str(cache)!r}: {error}") from None


def _find(paths: Sequence[str], suffixes: Sequence[str]) -> list[tuple[str, Path, bool]]:
    """(name relative to its path, file, whether the user named the file itself), sorted within each path."""
    if not paths:
        root = Path(sysconfig.get_path("stdlib"))
        return [(name, file, False) for name, file in _walk(root, (".py",), _STANDARD_LIBRARY_SKIPS)]
    found: list[tuple[str, Path, bool]] = []
    for text in paths:
        path = Path(os.path.expanduser(text))
        if os.path.isdir(path):  # pathlib's own tests raise for names too long and the like
            found += [(name, file, False) for name, file in _walk(path, tuple(suffixes), frozenset())]
        elif os.path.isfile(path):
            found.append((path.name, path, True))
        else:
            raise ValueError(f"data.paths: {text!r} is no file or folder; allowed: text files and folders of them")
    return found


def _walk(root: Path, suffixes: tuple[str, ...], skips: frozenset[str]) -> list[tuple[str, Path]]:
    found = []
    for folder, subfolders, names in root.walk():  # follows no links to folders: no loops, nothing twice
        subfolders[:] = [name for name in subfolders if not (name.startswith(".") or name == "__pycache__" or name in skips)]
        files = [folder / name for name in names if name.endswith(suffixes)]
        found += [(file.relative_to(root).as_posix(), file) for file in files if os.path.isfile(file)]  # no pipes, no dead links
    return sorted(found)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # reading it will say why


def _save(tokens: np.ndarray, file: Path) -> None:
    part = file.with_name(f"{file.name}.{uuid4().hex}")
    try:
        with open(part, "wb") as out:
            np.save(out, tokens)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([] if tokenizer.end_of_document is None else [tokenizer.end_of_document], dtype=dtype)
    pieces = [np.empty(0, dtype)]
    try:
        for ids in tokenizer.encode(document.content for document in documents):
            pieces += [ids.astype(dtype, copy=False), end]
    except ValueError as error:
        raise ValueError(f"{error} (in {documents[len(pieces) // 2].name})") from None
    return np.concatenate(pieces)
