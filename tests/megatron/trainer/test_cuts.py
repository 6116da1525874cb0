"""Parts of parameters as ranges of the whole, and back; rows that ranks have together."""

import pytest
import torch
from processes import run_ranks
from torch import nn

from pipehc.megatron.trainer.cuts import Cut, cut_of, is_shared, join

CUTS = [(0, 1, (6, 5)), (0, 2, (8, 3)), (1, 1, (7, 4)), (0, 1, (4,))]  # dimension, strides, shape of a part


@pytest.mark.parametrize(("dim", "strides", "shape"), CUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranges_of_a_part_are_those_of_the_whole(dim, strides, shape, ranks):
    """Of every range of a part; those of all ranks together are the whole."""
    whole = torch.arange(torch.empty(Cut(dim, strides, 0, ranks).whole(shape)).numel())
    seen = []
    for rank in range(ranks):
        cut = Cut(dim, strides, rank, ranks)
        part = cut.own(whole.view(cut.whole(shape)))
        assert part.shape == shape
        flat = part.reshape(-1)
        seen.append(flat)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                runs = list(cut.runs(shape, start, stop - start))
                assert sum(run.length for run in runs) == stop - start and [r.part for r in runs[:1]] == [start] * bool(runs)
                for run in runs:
                    assert torch.equal(flat[run.part : run.part + run.length], whole[run.whole : run.whole + run.length])
    assert torch.equal(torch.cat(seen).sort().values, whole)


def test_halves_of_swiglu_are_cut_alike():
    gate_and_up = torch.arange(8)
    assert [Cut(0, 2, rank, 2).own(gate_and_up).tolist() for rank in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(("dim", "strides", "shape"), CUTS)
def test_what_ranks_join_is_the_whole_and_what_is_loaded_comes_back(dim, strides, shape):
    """Of any range; few ranges, however many rows."""

    def fn(rank):
        cut, group = Cut(dim, strides, rank, 2), torch.distributed.group.WORLD
        whole = torch.arange(torch.empty(cut.whole(shape)).numel(), dtype=torch.float32)
        part = cut.own(whole.view(cut.whole(shape))).reshape(-1)
        for start in range(len(part)):
            for stop in range(start, len(part) + 1):
                own = part[start:stop].clone()
                joined = join(own, shape, start, cut, group)
                assert len(joined.held) <= (3 if dim else strides)
                covered = set()
                for held in joined.held:
                    length = held.tensor.numel()
                    assert held.shape == cut.whole(shape)
                    assert torch.equal(held.tensor, whole[held.start : held.start + length])
                    covered |= set(held.tensor.tolist())
                    held.tensor.neg_()
                assert covered >= set(part[start:stop].tolist())
                joined.take()
                assert torch.equal(own, -part[start:stop])

    run_ranks(fn, 2)


class Group:
    def size(self):
        return 2

    def rank(self):
        return 1


def test_experts_are_neither_cut_nor_shared():
    norm, linear, expert = (nn.Parameter(torch.zeros(4, 2)) for _ in range(3))
    for parameter in (linear, expert):
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 2
    expert.allreduce = False
    assert [cut_of(p, Group()) for p in (norm, linear, expert)] == [Cut(), Cut(0, 2, 1, 2), Cut()]
    assert [is_shared(p, Group()) for p in (norm, linear, expert)] == [True, False, False]
