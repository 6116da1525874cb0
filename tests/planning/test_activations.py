"""Bytes kept for a micro-batch: as planned from the sizes, as counted in the first step, and as told to the user."""

import preloaded  # noqa: F401
import pytest
import torch
from processes import run_ranks
from tiny_model import tiny_config

from pipehc.data.batches import Sampler
from pipehc.planning.activations import Activations, as_metrics, describe, planned

SAMPLES = 23


class Split:
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.randint(0, 256, (13,), generator=torch.Generator().manual_seed(index))


def counted(*overrides):
    config = tiny_config("train.sequence_length=12", *overrides)

    def fn(rank):
        from pipehc.trainer import Trainer

        trainer = Trainer(config)
        found = []
        for step in (1, 2):
            loss = trainer.step(step, Split(), Sampler(SAMPLES, seed=7)).loss
            found.append(trainer.saved_activations())
        assert found[0] == found[1]  # the second step counts nothing
        return found[0], loss

    results = run_ranks(fn, config.parallel.pp * config.parallel.tp)
    assert all(result == results[0] for result in results)
    return results[0][0], planned(config)


CASES = {
    "mhc over two ranks": ("residual.kind=mhc", "schedule.name=dualpipe", "parallel.pp=2"),
    "mhc in blocks": ("residual.kind=mhc", "recompute.block=1"),
    "plain residual": ("residual.kind=none",),
    "tokens over two": ("residual.kind=mhc", "parallel.tp=2"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_the_trainer_counts(case):
    found, plan = counted("recompute.enabled=true", *CASES[case])
    assert len(found) == len(plan)
    for stage, expected in enumerate(plan):
        saved = found[stage]
        assert (saved.streams, saved.outputs, saved.connections) == (expected.streams, expected.outputs, 0)
        assert saved.rebuilt > 0.4 * expected.rebuilt
        assert saved.f > saved.outputs


def test_without_recomputation_hyper_connections_keep_what_they_save():
    found, plan = counted("recompute.enabled=false")
    [saved] = found.values()
    assert plan is None and (saved.streams, saved.outputs, saved.rebuilt) == (0, 0, 0)
    assert saved.connections > 8 * 3 * 12 * 2 * 32 * 4  # more than the streams of every sub-layer


def test_words_and_metrics():
    saved = Activations(3 << 20, 1 << 20, 5 << 19, 0, 7 << 20)
    assert describe(2, saved) == (
        "stage 2 keeps 6.50 MiB a micro-batch: streams 3.00 MiB, F outputs 1.00 MiB, F 2.50 MiB; rebuilds 7.00 MiB"
    )
    assert as_metrics({2: saved})["saved/stage2/f"] == 5 << 19
