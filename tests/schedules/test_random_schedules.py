"""A thousand random schedules, executed by four processes: equal gradients, and none hangs."""

import random
from functools import lru_cache

import pytest
import torch
from processes import run_ranks
from random_schedules import random_auto, random_family, random_schedule
from toy_chain import CHANNELS, STREAMS, TOKENS, Toy, streams
from toy_stages import ROWS, WIDTH, OverlapToyStage, reference

from pipehc.comm.groups import edge_groups
from pipehc.comm.messages import Mailbox
from pipehc.comm.queues import make_queues
from pipehc.model.stage import ModelStage
from pipehc.schedules import ScheduleError, compile
from pipehc.schedules.execute import execute

RANKS = 4
EDGES = [(a, b) for a in range(RANKS) for b in range(RANKS) if a != b]


def random_programs(seed, count):
    """(program, overlap) of valid schedules; a tenth from the search, the rest from families and at random."""
    rng, programs = random.Random(seed), []
    while len(programs) < count:
        make = random_auto if rng.random() < 0.1 else rng.choice([random_family, random_schedule])
        options = {"ahead": rng.randint(1, 4), "split_backward": rng.random() < 0.7, "recompute": rng.random() < 0.5}
        try:
            program = compile(make(rng, RANKS), high=rng.random() < 0.5, **options)
        except ScheduleError:
            continue  # pairs in a random order may wait for each other
        programs.append((program, rng.random() < 0.5))
    return programs


@pytest.mark.slow
def test_a_thousand_schedules_run_to_equal_gradients():
    """fp64, against one process; all in one launch, over the same groups and buffers."""
    programs = random_programs(seed=5, count=1000)

    def run(rank):
        mailbox = Mailbox(edge_groups([list(range(RANKS))], EDGES), (ROWS, WIDTH), torch.float64, timeout_s=60)
        found = []
        for program, overlap in programs:
            placement = program.schedule.placement
            log = []
            stages = {key: OverlapToyStage(key[1], placement.stages, log) for key in placement.held(rank)}
            execute(program.instructions[rank], placement, stages, mailbox, overlap=overlap)
            assert not any(s.deferred or s.saved for s in stages.values())
            found.append([(stage, s.grad) for (_, stage), s in stages.items()])
        return found

    results = run_ranks(run, RANKS, timeout=400)
    expected = lru_cache(maxsize=None)(lambda stages, m: [s.grad for s in reference(stages, m)])
    kinds = set()
    for index, (program, overlap) in enumerate(programs):
        schedule = program.schedule
        stages = schedule.placement.stages
        total = [torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in range(stages)]
        for per_rank in results:
            for stage, grad in per_rank[index]:
                total[stage] += grad
        for found, wanted in zip(total, expected(stages, schedule.microbatches), strict=True):
            assert (found - wanted).norm() <= 1e-12 * wanted.norm(), str(schedule)
        kinds.add((schedule.name, schedule.placement.kind, overlap))
    assert len(kinds) > 30


def model_stage(stage, stages, queues, recompute):
    """A stage of one or two blocks with all nodes and queues, and its weights."""
    toy = Toy(1 + stage % 2, dense=stage % 2, seed=stage)
    chain = toy.chain(block=(None, 1, 2)[stage % 3], first=stage == 0, last=stage == stages - 1)
    return toy, ModelStage(chain, queues, lambda m: (streams(m), streams(m + 1000)), 0.5, recompute=recompute)


def gradients_of_one_process(stages, microbatches):
    queues = make_queues(torch.device("cpu"))
    chain = [model_stage(stage, stages, queues, recompute=False) for stage in range(stages)]
    for m in range(microbatches):
        value = None
        for _, stage in chain:
            value = stage.forward(m, value)
        for _, stage in reversed(chain):
            value = stage.backward_input(m, value)
            stage.backward_weight(m)
    return [toy.take_gradients() for toy, _ in chain]


@pytest.mark.slow
def test_nodes_and_queues_of_real_stages_run_to_equal_gradients():
    """Hyper-connections, all-to-alls, deferred weight gradients, the high-priority queue: what `ModelStage` does."""
    rng = random.Random(6)
    programs = []
    while len(programs) < 16:
        recompute = rng.random() < 0.5
        try:
            program = compile(rng.choice([random_family, random_schedule])(rng, RANKS), high=True, recompute=recompute)
        except ScheduleError:
            continue
        programs.append((program, recompute, rng.random() < 0.6))

    def run(rank):
        shape = (TOKENS, 1, STREAMS * CHANNELS)
        mailbox = Mailbox(edge_groups([list(range(RANKS))], EDGES), shape, torch.float32, timeout_s=60)
        found = []
        for program, recompute, overlap in programs:
            placement = program.schedule.placement
            queues, toys, stages = make_queues(torch.device("cpu")), {}, {}
            for key in placement.held(rank):
                toys[key], stages[key] = model_stage(key[1], placement.stages, queues, recompute)
            execute(program.instructions[rank], placement, stages, mailbox, overlap=overlap, queues=queues)
            found.append([(stage, toy.take_gradients()) for (_, stage), toy in toys.items()])
        return found

    results = run_ranks(run, RANKS, timeout=300)
    expected = lru_cache(maxsize=None)(gradients_of_one_process)
    for index, (program, *_) in enumerate(programs):
        schedule = program.schedule
        wanted = expected(schedule.placement.stages, schedule.microbatches)
        total = [dict.fromkeys(of_stage, 0) for of_stage in wanted]
        for per_rank in results:
            for stage, gradients in per_rank[index]:
                for name, gradient in gradients.items():
                    total[stage][name] = total[stage][name] + gradient
        for found, reference_of_stage in zip(total, wanted, strict=True):
            for name, gradient in reference_of_stage.items():
                assert (found[name] - gradient).norm() <= 3e-5 * gradient.norm(), (name, str(schedule))
