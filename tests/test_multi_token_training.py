"""Multi-token prediction over pipelines: gradients, figures and weights are those of one process."""

import preloaded  # noqa: F401
import pytest
import torch
from one_step import compare, one_step, references
from processes import run_ranks
from training_leg import training_leg

from pipehc.config.loading import load_config

SMALL = "train.sequence_length=12", "model.blocks=4", "train.global_batch=8", "model.mtp_depth=2"


@pytest.fixture(scope="module")
def reference(tiny):
    return references(tiny, SMALL)


def run(tiny, processes, *overrides):
    return run_ranks(one_step, processes, tiny, [*SMALL, *overrides], timeout=240)


# Schedule, P, ep, tp, dp, residual: what lies on one rank, on two, over replicas, and in shards of the optimizer.
QUICK = [("1f1b", 2, 1, 1, 1, "mhc"), ("dualpipe", 2, 1, 1, 1, "mhc")]
SLOW = [
    ("1f1b", 2, 2, 1, 2, "none"),
    ("1f1b", 2, 1, 2, 1, "mhc"),
    ("1f1b", 1, 1, 2, 1, "none"),
    ("interleaved", 2, 1, 1, 2, "mhc"),
    ("dualpipe", 2, 2, 1, 2, "mhc"),
    ("dualpipe", 2, 1, 2, 1, "none"),
    ("dualpipe", 4, 1, 1, 1, "mhc"),
    ("dualpipev", 2, 1, 1, 1, "mhc"),
    ("dualpipev", 1, 1, 1, 1, "none"),
    ("dualpipev", 2, 2, 2, 1, "harmonized"),
]


@pytest.mark.parametrize(
    ("name", "pp", "ep", "tp", "dp", "kind"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_equals_one_process(tiny, reference, name, pp, ep, tp, dp, kind):
    settings = f"residual.kind={kind}", "residual.target_gain=1"
    layout = f"schedule.name={name}", f"parallel.pp={pp}", f"parallel.ep={ep}", f"parallel.tp={tp}", f"parallel.dp={dp}"
    more = () if pp < 4 and (name, pp) != ("interleaved", 2) else ("model.blocks=8",)
    expected = reference(*settings, *more)
    assert expected[6].keys() >= {"mtp_1_loss", "mtp_2_loss"} and abs(expected[1] - expected[0]) < 0.2
    assert all(abs(expected[6][f"mtp_{k}_loss"] - expected[1]) < 0.5 for k in (1, 2))
    buckets = ("runtime.bucket_size=3000",) if dp > 1 else ()
    compare(run(tiny, pp * tp * dp, *layout, *settings, *more, *buckets), expected, layout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_overlap_and_recomputation_change_no_bit(tiny, name):
    layout = f"schedule.name={name}", "parallel.pp=2", "parallel.ep=2", "recompute.modules=[swiglu, mla_up_proj]"
    plain = None
    for on in ("false", "true"):
        results = run(tiny, 4, *layout, f"runtime.overlap={on}", f"recompute.enabled={on}")
        plain = plain or results
        for expected, found in zip(plain, results):
            assert found[:4] == expected[:4] and found[6:] == expected[6:]
            assert found[4].keys() == expected[4].keys() and found[4]
            assert all(torch.equal(gradient, expected[4][name]) for name, gradient in found[4].items())


@pytest.mark.slow
def test_bf16_trains(tiny, reference):
    [expected] = run(tiny, 1, "train.precision=bf16")
    for found in run(tiny, 4, "train.precision=bf16", "parallel.pp=2", "parallel.dp=2", "schedule.name=1f1b"):
        assert found[:2] == pytest.approx(expected[:2], rel=1e-3) and found[2] == pytest.approx(expected[2], rel=3e-2)
        assert found[6] == pytest.approx(expected[6], rel=1e-2)
    assert expected[6]["mtp_2_loss"] == pytest.approx(reference()[6]["mtp_2_loss"], rel=1e-2)


def train(rank, path, folder, overrides, begin, end):
    """Losses, gradient norms and figures of steps begin + 1 to end, from the checkpoint of `begin` if that is not 0."""
    _, results = training_leg(path, folder, [*SMALL, *overrides], begin, end)
    return [(r.loss, r.grad_norm, r.figures["mtp_1_loss"], r.figures["mtp_2_loss"]) for r in results]


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_other_layouts(tiny, tmp_path):
    """With the losses of one process. Both copies of the embedding get weights and moments, of which the file has one."""
    layouts = [
        (2, ["parallel.pp=2", "schedule.name=dualpipe"]),
        (4, ["parallel.pp=2", "parallel.dp=2", "runtime.bucket_size=3000"]),
        (1, []),
        (4, ["parallel.pp=2", "parallel.tp=2", "schedule.name=dualpipev"]),
        (2, ["parallel.pp=2"]),
    ]
    [alone] = run_ranks(train, 1, tiny, tmp_path / "alone", [], 0, len(layouts), timeout=240)
    for begin, (processes, layout) in enumerate(layouts):
        for found in run_ranks(train, processes, tiny, tmp_path / "changed", layout, begin, begin + 1, timeout=240):
            assert found[0] == pytest.approx(alone[begin], rel=1e-5), layout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1f1b", "dualpipe"])
def test_copies_of_the_embedding_that_drift_apart_are_noticed(tiny, name):
    """On two ranks, and on one that has both."""

    def fn(rank):
        from pipehc.trainer import Trainer, TrainingError

        trainer = Trainer(load_config(tiny, [*SMALL, "parallel.pp=2", f"schedule.name={name}"]))
        trainer.check_replicas()
        saved = sum(key == "weights.embedding.word_embeddings.weight" for key in trainer.state())
        if rank == 1:
            last = next(model for (_, stage), model in trainer.models.items() if stage == 1)
            last.embedding.word_embeddings.weight.data.view(torch.int32)[3, 5] ^= 1
        with pytest.raises(TrainingError, match=r"hold different weights in embedding\.word_embeddings\.weight"):
            trainer.check_replicas()
        return saved

    assert run_ranks(fn, 2) == ([1, 0] if name == "1f1b" else [1, 1])
