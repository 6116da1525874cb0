"""Tensor parallelism: every layout computes what one process computes, and checkpoints know nothing of it."""

import preloaded  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from one_step import RandomSplit, compare, one_step, references, whole
from processes import run_ranks
from training_leg import training_leg

from pipehc.checkpoint.store import Checkpoints
from pipehc.config.loading import load_config

SMALL = "train.sequence_length=12", "model.blocks=4", "train.global_batch=8"


@pytest.fixture(scope="module")
def reference(tiny):
    return references(tiny, SMALL)


def check_layout(tiny, expected, processes, *overrides):
    compare(run_ranks(one_step, processes, tiny, [*SMALL, "parallel.tp=2", *overrides], timeout=240), expected, overrides)


QUICK = [("1f1b", 1, 1, "mhc"), ("dualpipe", 2, 2, "mhc"), ("dualpipev", 2, 1, "none")]
SLOW = [
    ("1f1b", 1, 2, "none"),
    ("1f1b", 2, 1, "none"),
    ("1f1b", 2, 2, "mhc"),
    ("dualpipe", 2, 1, "none"),
    ("dualpipev", 1, 1, "mhc"),
    ("dualpipev", 1, 2, "none"),
    ("dualpipev", 2, 2, "mhc"),
]


@pytest.mark.parametrize(("name", "pp", "ep", "kind"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_equals_one_process(tiny, reference, name, pp, ep, kind):
    """Experts lie over the two ranks that share attention, or are on both."""
    layout = f"schedule.name={name}", f"parallel.pp={pp}", f"parallel.ep={ep}", f"residual.kind={kind}"
    check_layout(tiny, reference(f"residual.kind={kind}"), 2 * pp, *layout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hc", "isohc", "hybrid", "harmonized", "harmonized residual.static=true"])
def test_the_whole_family_equals_one_process(tiny, reference, kind):
    """With data parallelism, buckets of one layer, recomputation of maps and modules; harmonized with a feedback that moves."""
    settings = [*f"residual.kind={kind}".split(), "residual.target_gain=1"]
    layout = "schedule.name=dualpipe", "parallel.pp=2", "parallel.ep=2", "parallel.dp=2", "runtime.bucket_size=3000"
    recompute = "recompute.enabled=true", "recompute.modules=[swiglu, mla_up_proj]"
    check_layout(tiny, reference(*settings), 8, *layout, *recompute, *settings)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("runtime.fused=false", "parallel.ep=2"), marks=pytest.mark.slow),
        ("recompute.enabled=true", "recompute.modules=[swiglu, mla_up_proj]"),
    ],
)
def test_other_layers_equal_one_process(tiny, reference, settings):
    of_the_model = [s for s in settings if not s.startswith("parallel")]
    check_layout(tiny, reference(*of_the_model), 2, *settings)


@pytest.mark.slow
def test_four_ranks_share_a_model(tiny, reference):
    """Every rank has one head. Megatron's layer asks that the latent with its rotary part be divisible, though it is not cut."""
    settings = "model.heads=4", "model.rope_dim=8"
    check_layout(tiny, reference(*settings), 4, "parallel.tp=4", "parallel.ep=4", *settings)


def gradients_in_fp64(rank, path, settings):
    """Loss, and whole gradients by name, of a model whose parameters are made fp64; by plain autograd."""
    from pipehc.megatron.trainer.cuts import cut_of, is_shared
    from pipehc.megatron.trainer.groups import build_groups
    from pipehc.megatron.trainer.model import build_stage, initialise, parameter_names

    config = load_config(path, [*SMALL, *settings])
    groups = build_groups(1, config.parallel.tp, 1, False)
    model = build_stage(config, groups, range(config.model.blocks), first=True, last=True)
    initialise(model, 7, 0.1)
    model.double()
    tokens = torch.stack([RandomSplit(12)[i] for i in range(2)])
    loss = model(None, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()
    found = {}
    for name, parameter in parameter_names(model).items():
        if is_shared(parameter, groups.tp) or ".mlp.experts." in name:
            dist.all_reduce(parameter.grad)
        found[name] = whole(parameter.grad, cut_of(parameter, groups.tp), groups.tp)
    return float(loss), found


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        (["model.dense_blocks=4"], 1e-12),
        (["model.dense_blocks=0", "model.experts_shared=0", "residual.exit=sum"], 1e-6),  # routing is fp32
        pytest.param(["model.dense_blocks=1", "runtime.fused=false"], 1e-6, marks=pytest.mark.slow),  # the loss, too
    ],
    ids=str,
)
def test_gradients_in_fp64_are_those_of_one_process(tiny, settings, share):
    """What fp32 leaves of the gradients of maps, where large terms cancel, does not show a term that is left out."""
    [(loss, expected)] = run_ranks(gradients_in_fp64, 1, tiny, settings)
    for same, found in run_ranks(gradients_in_fp64, 2, tiny, [*settings, "parallel.tp=2"]):
        assert same == pytest.approx(loss, rel=share) and found.keys() == expected.keys()
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() <= share * expected[name].norm(), name


def train(rank, path, folder, overrides, begin, end):
    """Losses and gradient norms of steps begin + 1 to end, from the checkpoint of `begin` if that is not 0; saves that of `end`."""
    trainer, results = training_leg(path, folder, [*SMALL, *overrides], begin, end)
    return [(r.loss, r.grad_norm) for r in results], trainer.evaluate(RandomSplit(12), 1).loss


SHARED = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "schedule.name=dualpipe"]


def test_a_training_goes_on_with_another_tp_and_back(tiny, tmp_path):
    """With the losses of one process."""
    [(alone, evaluated)] = run_ranks(train, 1, tiny, tmp_path / "alone", [], 0, 3, timeout=240)
    found = []
    for begin, processes, layout in [(0, 4, SHARED), (1, 1, []), (2, 4, SHARED)]:
        results = run_ranks(train, processes, tiny, tmp_path / "changed", layout, begin, begin + 1, timeout=240)
        assert all(result == results[0] for result in results)
        found += results[0][0]
    for step, wanted in zip(found, alone, strict=True):
        assert step == pytest.approx(wanted, rel=1e-5)
    assert results[0][1] == pytest.approx(evaluated, rel=1e-5)


def copied(rank, path, source, target, overrides):
    from pipehc.trainer import Trainer

    trainer = Trainer(load_config(path, [*SMALL, *overrides]))
    restored = Checkpoints(source.parent, 4).load(source, trainer.state())
    trainer.after_load()
    trainer.check_replicas()
    Checkpoints(target, 4).save(restored.step, trainer.state(), restored.extra)


def contents(rank, path, source):
    from pipehc.trainer import Trainer

    trainer = Trainer(load_config(path, SMALL))
    state = trainer.state()
    Checkpoints(source.parent, 4).load(source, state)
    return {name: (held if isinstance(held, torch.Tensor) else held.tensor).clone() for name, held in state.items()}


def test_a_checkpoint_that_other_layouts_copy_stays_the_same_to_the_bit(tiny, tmp_path):
    """Weights and moments, cut by rows, by columns and by halves, in shards that end in the midst of a row."""
    run_ranks(train, 1, tiny, tmp_path / "0", [], 0, 1, timeout=240)
    layouts = [(4, SHARED), (4, ["parallel.tp=2", "parallel.dp=2", "runtime.bucket_size=3000"])]
    for i, (processes, overrides) in enumerate(layouts):
        run_ranks(copied, processes, tiny, tmp_path / f"{i}" / "step-00000001", tmp_path / f"{i + 1}", overrides, timeout=240)
    found = [run_ranks(contents, 1, tiny, tmp_path / f"{i}" / "step-00000001")[0] for i in range(len(layouts) + 1)]
    for other in found[1:]:
        assert other.keys() == found[0].keys() and all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())
    assert all(tensor.any() for name, tensor in found[0].items() if "linear" in name and "experts" not in name)


def test_parts_that_drift_apart_are_noticed_on_every_rank(tiny):
    def fn(rank):
        from pipehc.megatron.trainer.model import parameter_names
        from pipehc.trainer import Trainer, TrainingError

        trainer = Trainer(load_config(tiny, [*SMALL, "parallel.tp=2"]))
        trainer.check_replicas()
        (model,) = trainer.models.values()
        name = "decoder.layers.0.self_attention.linear_kv_down_proj.weight"
        parameter_names(model)["decoder.layers.0.mlp.linear_fc1.weight"].data.mul_(1 + rank)  # one rank alone has that part
        trainer.check_replicas()
        if rank == 1:
            parameter_names(model)[name].data.view(torch.int32)[3, 5] ^= 1
        with pytest.raises(TrainingError, match=f"ranks 0 and 1 hold different weights in {name}"):
            trainer.check_replicas()

    run_ranks(fn, 2)
