"""What neighbours compare before the first step, over real processes."""

import pytest
import torch
from processes import run_ranks
from tiny_model import tiny_config

from pipehc.comm.groups import edge_groups, neighbours_of
from pipehc.comm.handshake import compare_neighbours, connect, digest, first_problem
from pipehc.schedules import build, compile


def edges(ranks, name="1f1b"):
    return compile(build(name, ranks, 2 * ranks)).edges()


def compare(rank, facts):
    try:
        compare_neighbours(facts[rank], neighbours_of(rank, [list(range(4))], edges(4)))
    except ValueError as error:
        return str(error)
    return None


def test_a_mismatch_names_both_ranks_and_both_values_on_every_rank():
    same = {"shape": (128, 4, 512), "dtype": torch.float32, "schedule": digest(["0F0", "0B0"])}
    assert run_ranks(compare, 4, [same] * 4) == [None] * 4

    messages = run_ranks(compare, 4, [same, same, {**same, "shape": (128, 4, 256), "dtype": torch.bfloat16}, same])
    assert len(set(messages)) == 1  # also ranks 0 and 3, whose values are right
    for part in (
        "shape: rank 1 has (128, 4, 512), its neighbour rank 2 has (128, 4, 256)",
        "shape: rank 2 has (128, 4, 256), its neighbour rank 3 has (128, 4, 512)",
        "dtype: rank 1 has torch.float32, its neighbour rank 2 has torch.bfloat16",
    ):
        assert part in messages[0]
    assert "rank 0 has" not in messages[0]  # not a neighbour of rank 2


def test_every_rank_hears_of_the_first_problem():
    def tell(rank):
        alone, all_of_them = (None, None, "late", "later")[rank], "the same"
        return first_problem(alone), first_problem(all_of_them), first_problem(None)

    assert run_ranks(tell, 4) == [("rank 2: late", "the same", None)] * 4


def test_a_missing_fact_is_a_mismatch():
    messages = run_ranks(compare, 4, [{"dtype": 1}, {}, {}, {}])
    assert "dtype: rank 0 has 1, its neighbour rank 1 has nothing" in messages[2]


def two_pipelines(rank):
    """Positions 0 and 1 of two pipelines are ranks 0, 2 and 1, 3: only neighbours within a pipeline are compared."""
    pipelines = [[0, 2], [1, 3]]
    connect(edge_groups(pipelines, edges(2)))
    neighbours = neighbours_of(rank, pipelines, edges(2))
    assert neighbours == [(rank + 2) % 4]
    compare_neighbours({"data": rank % 2}, neighbours)
    with pytest.raises(ValueError, match="rank 0 has 0, its neighbour rank 2 has 1"):
        compare_neighbours({"data": rank // 2}, neighbours)


def test_pipelines_are_compared_apart():
    run_ranks(two_pipelines, 4)


def test_connects_two_ranks_that_are_neighbours_both_ways():
    run_ranks(lambda rank: connect(edge_groups([[0, 1]], edges(2, "dualpipe"))), 2)


def test_digest_tells_programs_apart():
    one, other = (compile(build("dualpipe", 4, 8), ahead=ahead).instructions for ahead in (1, 2))
    assert digest(one) == digest(compile(build("dualpipe", 4, 8), ahead=1).instructions) != digest(other)
    assert len(digest(one)) == 16


def test_the_trainer_refuses_ranks_that_do_not_fit_before_the_first_step():
    from pipehc.trainer import Trainer, TrainingError  # imports Megatron: here, so that the processes need not

    def build_trainer(rank, changes):
        try:
            Trainer(tiny_config("parallel.pp=2", "train.micro_batch=1", *changes[rank]))
        except TrainingError as error:
            return str(error)
        return None

    assert run_ranks(build_trainer, 2, [(), ()]) == [None, None]
    first, second = run_ranks(build_trainer, 2, [(), ("residual.streams=2",)])
    assert first == second
    assert "stage message: rank 0 has (11, 1, 96) torch.float32, its neighbour rank 1 has (11, 1, 64) torch.float32" in first
    first, second = run_ranks(build_trainer, 2, [(), ("train.global_batch=10",)])
    assert first == second and "schedule: rank 0 has" in first and "stage message" not in first
    # What would make other groups, or more of them, is found before any is made; whichever of the two is the one with neighbours.
    first, second = run_ranks(build_trainer, 2, [(), ("parallel.pp=1",)])
    assert first == second and "schedule: rank 0 has" in first
    first, second = run_ranks(build_trainer, 2, [("parallel.pp=1",), ()])
    assert first == second and "schedule: rank 0 has" in first
