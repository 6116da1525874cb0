"""Tensors in checkpoints as ranges of the flattened whole, so that every slicing of them reads every other.

Megatron's distributed optimizer cuts the concatenation of many parameters into equal parts: a rank holds an arbitrary
contiguous range of one parameter's elements, not rows or columns; with tensor parallelism several. torch.distributed.checkpoint
(DCP) stores boxes, so each tensor is stored as a one-dimensional tensor of its elements in row-major order, in boxes of one
dimension. The planners below are DCP's documented extension point; DCP balances, deduplicates, writes, and re-slices on reading.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pipehc.comm.ranks import RankError


@dataclass(frozen=True)
class FlatSlice:
    """Elements [start, start + tensor.numel()) of a tensor of `shape`, flattened in row-major order; may be empty.

    `tensor` is one-dimensional, of any dtype, on any device.
    """

    shape: tuple[int, ...]
    start: int
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        if self.tensor.dim() != 1:
            raise ValueError(f"a FlatSlice holds a 1-D tensor, not one of shape {tuple(self.tensor.shape)}")
        end, total = self.start + self.tensor.numel(), math.prod(self.shape)
        if not 0 <= self.start <= end <= total:
            raise ValueError(f"elements [{self.start}, {end}) are not inside a tensor of shape {self.shape} ({total} elements)")


Held = torch.Tensor | FlatSlice | Sequence[FlatSlice]
"""All of a tensor, or ranges of it, which do not overlap."""


@dataclass(frozen=True)
class Piece:
    """A range that one rank holds of one tensor, without its data."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """Shape and dtype of one tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: str


def pieces(tensors: Mapping[str, Held]) -> dict[str, list[Piece]]:
    """Describe what this rank holds."""
    return {
        name: [Piece(s.shape, _dtype_name(s.tensor.dtype), s.start, s.tensor.numel()) for s in _as_slices(held)]
        for name, held in tensors.items()
    }


def tile(ranks: Sequence[Mapping[str, Sequence[Piece]]]) -> dict[str, Stored]:
    """Join what all ranks hold. Every tensor must be covered exactly; equal pieces on several ranks count once.

    Raises ValueError naming the tensor where ranks disagree in shape or dtype, or where elements are missing or overlap.
    """
    whole: dict[str, Stored] = {}
    ranges: dict[str, set[tuple[int, int]]] = {}
    for rank, held in enumerate(ranks):
        for name, piece in _each(held):
            stored = Stored(piece.shape, piece.dtype)
            if whole.setdefault(name, stored) != stored:
                raise ValueError(f"{name}: rank {rank} holds {_text(stored)}, an earlier rank {_text(whole[name])}")
            if piece.length:
                ranges.setdefault(name, set()).add((piece.start, piece.start + piece.length))
    for name, stored in whole.items():
        end = 0
        for start, stop in sorted(ranges.get(name, ())):
            if start != end:
                fault = f"are held by no rank: [{end}, {start})" if start > end else f"overlap: [{start}, {min(end, stop)})"
                raise ValueError(f"{name}: elements {fault} of {math.prod(stored.shape)}")
            end = stop
        if end != math.prod(stored.shape):
            raise ValueError(f"{name}: elements are held by no rank: [{end}, {math.prod(stored.shape)})")
    return whole


def match(stored: Mapping[str, Stored], wanted: Sequence[Mapping[str, Sequence[Piece]]], strict: bool) -> None:
    """Check what all ranks want against what a checkpoint holds.

    Raises ValueError naming tensors that are missing or of another shape or dtype and, if `strict`, tensors that no rank wants.
    """
    asked = {name: Stored(piece.shape, piece.dtype) for held in wanted for name, piece in _each(held)}
    missing = sorted(asked.keys() - stored.keys())
    if missing:
        raise ValueError(f"the checkpoint lacks {_first(missing)}")
    for name, want in asked.items():
        if stored[name] != want:
            raise ValueError(f"{name}: the checkpoint holds {_text(stored[name])}, the model wants {_text(want)}")
    unasked = sorted(stored.keys() - asked.keys())
    if strict and unasked:
        raise ValueError(f"the checkpoint holds what the model does not have: {_first(unasked)}")


def write(folder: Path, tensors: Mapping[str, Held], group: dist.ProcessGroup | None) -> None:
    """Write what all ranks hold into `folder`, synced to disk: collective. `tile` must have accepted it."""
    planner = _SavePlanner(tensors)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=planner, process_group=group)
    except CheckpointException as failure:  # a BaseException: it would pass every `except Exception`
        raise RankError(f"writing {folder} failed: {_causes(failure)}") from failure


def read(folder: Path, tensors: Mapping[str, Held], group: dist.ProcessGroup | None) -> None:
    """Fill this rank's tensors in place from `folder`, reading only chunks that overlap them: collective."""
    planner = _LoadPlanner(tensors)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({}, storage_reader=dcp.FileSystemReader(folder), planner=planner, process_group=group)
    except CheckpointException as failure:
        raise RankError(f"reading {folder} failed: {_causes(failure)}") from failure
    planner.copy_back(tensors)


class _SavePlanner(dcp.DefaultSavePlanner):
    """One write item per non-empty slice. The base class drops equal items of other ranks and balances the rest."""

    def __init__(self, tensors: Mapping[str, Held]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.flat = _flat(tensors)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, held) for (name, _), held in self.flat.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return _of(self.flat, index)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def __init__(self, tensors: Mapping[str, Held]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.flat = _flat(tensors)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for (name, _), held in self.flat.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [_chunk(held)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return _of(self.flat, index)

    def copy_back(self, tensors: Mapping[str, Held]) -> None:
        """A tensor that is not contiguous cannot be flattened in place: it was read into a copy."""
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel() and not tensor.is_contiguous():
                tensor.detach().copy_(self.flat[name, 0].tensor.reshape(tensor.shape))


def _write_item(name: str, held: FlatSlice) -> WriteItem:
    data = TensorWriteData(
        chunk=_chunk(held),
        properties=TensorProperties(dtype=held.tensor.dtype),
        size=torch.Size([math.prod(held.shape)]),
    )
    return WriteItem(index=MetadataIndex(name, [held.start]), type=WriteItemType.SHARD, tensor_data=data)


def _chunk(held: FlatSlice) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([held.start]), sizes=held.tensor.shape)


def _as_slices(held: Held) -> list[FlatSlice]:
    if isinstance(held, torch.Tensor):
        return [FlatSlice(tuple(held.shape), 0, held.detach().reshape(-1))]
    ranges = [held] if isinstance(held, FlatSlice) else held
    return [FlatSlice(tuple(s.shape), s.start, s.tensor.detach()) for s in ranges]


def _flat(tensors: Mapping[str, Held]) -> dict[tuple[str, int], FlatSlice]:
    """All that are not empty, by name and start."""
    return {(name, s.start): s for name, held in tensors.items() for s in _as_slices(held) if s.tensor.numel()}


def _of(flat: Mapping[tuple[str, int], FlatSlice], index: MetadataIndex) -> torch.Tensor:
    """The range that DCP calls for: by where it starts."""
    assert index.offset is not None
    return flat[index.fqn, index.offset[0]].tensor


def _each(held: Mapping[str, Sequence[Piece]]) -> Iterator[tuple[str, Piece]]:
    return ((name, piece) for name, ranges in held.items() for piece in ranges)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(stored: Stored) -> str:
    return f"shape {list(stored.shape)} {stored.dtype}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _causes(failure: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {type(error).__name__}: {error}" for rank, (error, _) in failure.failures.items())
