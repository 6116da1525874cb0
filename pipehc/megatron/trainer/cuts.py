"""How tensor parallelism cuts parameters, and where the parts lie in the whole: checkpoints and first weights know that alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipehc.checkpoint.flat_slices import FlatSlice


class Run(NamedTuple):
    """Elements that follow each other both in a rank's part and in the whole, each flattened: where they start, and how many."""

    part: int
    whole: int
    length: int


class Cut(NamedTuple):
    """Of a tensor's dimension `dim`, cut into `strides` equal pieces (gate and up of SwiGLU are two), each rank has part number
    `rank` of `ranks` of each."""

    dim: int = 0
    strides: int = 1
    rank: int = 0
    ranks: int = 1

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole, from that of a part."""
        return tuple(size * self.ranks if dim == self.dim else size for dim, size in enumerate(shape))

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part."""
        if self.ranks == 1:
            return whole
        pieces = whole.chunk(self.strides * self.ranks, self.dim)[self.rank :: self.ranks]
        return torch.cat(pieces, self.dim)

    def runs(self, shape: Sequence[int], start: int, length: int) -> Iterator[Run]:
        """Of elements [start, start + length) of a part of `shape`, in order."""
        unit = prod(shape[self.dim :]) // self.strides  # so many follow each other
        while length:
            piece, within = divmod(start, unit)
            count = min(length, unit - within)
            yield Run(start, (piece * self.ranks + self.rank) * unit + within, count)
            start, length = start + count, length - count


def cut_of(parameter: nn.Parameter, tp_group: Any) -> Cut:
    """How a parameter of a stage is cut. Experts are not: their ranks have other ones, or other tokens."""
    of: Any = parameter
    if tp_group.size() == 1 or _is_of_experts(parameter) or not getattr(of, "tensor_model_parallel", False):
        return Cut()
    return Cut(of.partition_dim, of.partition_stride, tp_group.rank(), tp_group.size())


def is_shared(parameter: nn.Parameter, tp_group: Any) -> bool:
    """Whether every rank of the group has all of it, and uses it for its own tokens: so is what is not cut, but for experts, whose
    gradients are summed over other groups."""
    return tp_group.size() > 1 and cut_of(parameter, tp_group).ranks == 1 and not _is_of_experts(parameter)


def _is_of_experts(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


class Joined(NamedTuple):
    """A range of a rank's part of a tensor, as ranges of the whole. rows, own: of a tensor cut by columns, rows that the ranks have
    together [rows, columns], copied, and this rank's part of them."""

    held: FlatSlice | list[FlatSlice]
    rows: Tensor | None = None
    own: Tensor | None = None
    cut: Cut = Cut()

    def take(self) -> None:
        """What was loaded into the copies goes where they came from."""
        if self.rows is not None and self.own is not None:
            self.own.copy_(self.cut.own(self.rows))


def join(tensor: Tensor, shape: tuple[int, ...], start: int, cut: Cut, tp_group: Any) -> Joined:
    """tensor: elements [start, start + numel) of a part of `shape`. Collective over the ranks that have the other parts, of which
    each gives the same range of its own."""
    whole = cut.whole(shape)

    def views(first: int, last: int) -> list[FlatSlice]:
        runs = cut.runs(shape, first, last - first)
        return [FlatSlice(whole, run.whole, tensor[run.part - start : run.part - start + run.length]) for run in runs]

    if cut.ranks == 1:
        return Joined(FlatSlice(shape, start, tensor))
    if cut.dim == 0:
        return Joined(views(start, start + tensor.numel()))
    width, end = prod(shape[1:]), start + tensor.numel()
    top, bottom = -(-start // width), end // width
    if bottom <= top:
        return Joined(views(start, end))
    own = tensor[top * width - start : bottom * width - start].view(-1, width)
    parts = [torch.empty_like(own) for _ in range(cut.ranks)]
    dist.all_gather(parts, own.contiguous(), group=tp_group)
    rows = torch.cat(parts, 1)
    interior = FlatSlice(whole, top * width * cut.ranks, rows.view(-1))
    return Joined([*views(start, top * width), interior, *views(bottom * width, end)], rows, own, cut)
