"""Megatron's indexed data sets (PREFIX.bin, PREFIX.idx) as training and validation splits, and how to write one.

`GPTDataset` joins documents in an order drawn from the seed and cuts them into samples; the order of samples is left to
`pipehc.data.batches.Sampler`, as for text, so Megatron builds one epoch only and its own sample shuffle does no harm.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split as Side
from torch import Tensor
from torch.utils.data import ConcatDataset

_MAGIC = b"MMIDIDX\0\0"
_CHECKED_SAMPLES = 16
_ENDS = 1 << 20


@dataclass(frozen=True)
class Indexed:
    """Both sides, the number of documents of both together, and a hash that differs when the samples do."""

    train: "Samples"
    validation: "Samples"
    documents: int
    fingerprint: str


class Samples:
    """Samples of one side of several data sets, one set after the other: 1-D int64, sequence_length + 1 tokens."""

    def __init__(self, parts: list[GPTDataset], vocab_size: int) -> None:
        self._samples: ConcatDataset | list = ConcatDataset(parts) if parts else []
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = self._samples[index]
        tokens = torch.cat([sample["tokens"], sample["labels"][-1:]])
        # Checked as they come: reading terabytes at the start is out of the question, and an embedding's error says nothing.
        if (top := int(tokens.max())) >= self._vocab_size:
            raise ValueError(f"model.vocab_size: {self._vocab_size} is too small: the indexed data holds token {top}; "
                             f"allowed: at least {top + 1}")
        return tokens


def open_indexed(prefixes: Sequence[str], validation_fraction: float, sequence_length: int, vocab_size: int, seed: int,
                 cache: Path) -> Indexed:
    """Open indexed data sets; the last `validation_fraction` of each one's sequences is validation (Megatron's split rule).

    Collective when torch.distributed is initialised (rank 0 builds what `cache`, a folder all ranks see, lacks); without it any
    number of processes may call at once. ValueError: a file missing or damaged, too few tokens, a token outside `vocab_size`.
    """
    if not prefixes:
        raise ValueError("data.paths: [] is not allowed with data.kind: megatron; allowed: prefixes of .bin and .idx files")
    prefixes = [os.path.expanduser(prefix) for prefix in prefixes]
    data = [_open(prefix) for prefix in prefixes]
    fingerprint = hashlib.blake2b(f"{validation_fraction} {sequence_length} {seed}".encode(), digest_size=16)
    for prefix in prefixes:
        for file in (f"{prefix}.idx", f"{prefix}.bin"):
            _fingerprint(file, fingerprint)
    # Megatron names its cache files by prefix and options alone: rewritten data would meet the old index. So: a folder for every
    # state of the data.
    state = hashlib.blake2b(f"{megatron.core.__version__} {fingerprint.hexdigest()} {prefixes}".encode(), digest_size=16)
    folder = cache / f"indexed-{state.hexdigest()}"

    def build(at: Path) -> list[Samples]:
        config = _config(prefixes, validation_fraction, sequence_length, seed, at)
        sides = ([_side(prefix, dataset, side, config) for prefix, dataset in zip(prefixes, data)]
                 for side in (Side.train, Side.valid))
        return [Samples([part for part in parts if part is not None], vocab_size) for parts in sides]

    _build_once(folder, build)
    train, validation = build(folder)
    documents = sum(map(len, data))
    for name, samples in [("training", train)] + ([("validation", validation)] if validation_fraction else []):
        if not len(samples):
            raise ValueError(f"data.paths: too little text: one sample takes {sequence_length + 1} tokens (train.sequence_"
                             f"length {sequence_length} + 1), and none of {prefixes} has so many for {name}; data.validation_"
                             f"fraction is {validation_fraction}, and there are {documents} documents")
        for number in range(min(_CHECKED_SAMPLES, len(samples))):
            samples[number]  # a wrong vocabulary shows at once
    return Indexed(train, validation, documents, fingerprint.hexdigest())


def write_indexed(documents: Iterable[np.ndarray], prefix: Path, vocab_size: int) -> int:
    """Write token arrays (1-D, one a document, its end-of-document token included) to PREFIX.bin and PREFIX.idx; how many tokens.

    Whole or not at all: the index, without which the data is not one, appears last.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    part = prefix.with_name(f"{prefix.name}.{uuid4().hex}")
    written = 0
    try:
        builder = IndexedDatasetBuilder(f"{part}.bin", dtype=DType.optimal_dtype(vocab_size))
        for tokens in documents:
            builder.add_item(torch.from_numpy(tokens.astype(np.int64)))
            builder.end_document()
            written += len(tokens)
        builder.finalize(f"{part}.idx")
        for suffix in ("bin", "idx"):
            os.replace(f"{part}.{suffix}", f"{prefix}.{suffix}")
    finally:
        for suffix in ("bin", "idx"):
            Path(f"{part}.{suffix}").unlink(missing_ok=True)
    return written


class _NoTokenizer:
    """What `GPTDatasetConfig` asks of a tokenizer. The data is tokens already, and no mask depends on the end of a document."""

    vocab_size = None
    eod = None
    unique_identifiers = "none"


def _config(prefixes: list[str], validation_fraction: float, sequence_length: int, seed: int, folder: Path) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed, sequence_length=sequence_length, blend=(prefixes, None),
        split=f"{1 - validation_fraction:.9f},{validation_fraction:.9f},0", path_to_cache=str(folder), tokenizer=_NoTokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False)


def _side(prefix: str, dataset: IndexedDataset, side: Side, config: GPTDatasetConfig) -> GPTDataset | None:
    """The part of one data set that is on `side`, or None when it is shorter than a sample: Megatron does not check."""
    assert config.split_matrix is not None
    ends = config.split_matrix[side.value]
    if ends is None:
        return None
    first, last = (round(end * len(dataset)) for end in ends)
    if dataset.sequence_lengths[first:last].sum(dtype=np.int64) <= config.sequence_length:
        return None
    return GPTDataset(dataset, prefix, np.arange(first, last, dtype=np.int32), None, side, config)


def _fingerprint(file: str, into: "hashlib.blake2b") -> None:
    """Size and both ends: an index of a large data set has gigabytes, too many to hash at every start."""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        into.update(size.to_bytes(8) + stream.read(_ENDS))
        stream.seek(max(0, size - _ENDS))
        into.update(stream.read(_ENDS))


def _open(prefix: str) -> IndexedDataset:
    for file in (f"{prefix}.idx", f"{prefix}.bin"):
        if not os.path.isfile(file):
            raise ValueError(f"data.paths: {prefix!r}: the file {file!r} is missing; allowed with data.kind: megatron: the "
                             "common prefix of a .bin and a .idx file, without .bin")
    try:
        with open(f"{prefix}.idx", "rb") as index:
            if index.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{prefix}.idx is no Megatron index")
        if not os.path.getsize(f"{prefix}.bin"):
            raise ValueError(f"{prefix}.bin is empty")
        dataset = IndexedDataset(prefix)
        need = int(dataset.index.sequence_pointers[-1]) + int(dataset.sequence_lengths[-1]) * dataset.index.dtype_size
        if (size := os.path.getsize(f"{prefix}.bin")) < need:
            raise ValueError(f"{prefix}.bin has {size} bytes, its index says {need}")
    except (AssertionError, OSError, ValueError) as error:
        raise ValueError(f"data.paths: {prefix!r} is no readable indexed data set: {error}") from None
    return dataset


def _build_once(folder: Path, build: Callable[[Path], object]) -> None:
    """Make sure that `folder` holds a finished index; with torch.distributed rank 0 works, and all ranks share its failure."""
    failure: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            _build_aside(folder, build)
        except Exception as error:  # whatever it is, the others must not wait for it
            failure = error
    if dist.is_initialized():
        message: list[str | None] = [None if failure is None else f"rank 0: {failure}"]
        dist.broadcast_object_list(message, src=0)
        if message[0] is not None and failure is None:
            raise ValueError(message[0])
    if failure is not None:
        raise failure
    if not folder.is_dir():
        raise ValueError(f"run.folder: {str(folder)!r}, written by rank 0, is not visible here; allowed: a shared folder")


def _build_aside(folder: Path, build: Callable[[Path], object]) -> None:
    """The folder appears by a rename: nobody reads half of an index, and of several processes the first to finish wins."""
    if folder.is_dir():
        return
    part = folder.with_name(f"{folder.name}.{uuid4().hex}")
    try:
        part.mkdir(parents=True)
        build(part)
        part.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # somebody else's is as good
            raise ValueError(f"run.folder: cannot write the data index to {str(folder)!r}: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
