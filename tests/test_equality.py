"""Every schedule, layout and residual computes what one process computes: loss, gradient norm and every parameter's gradient."""

import os

import preloaded  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from one_step import RandomSplit, compare, one_step, references, watch_gradients
from processes import run_ranks

from pipehc.config.loading import load_config


@pytest.fixture(scope="module")
def reference(tiny):
    """One process's results, by residual kind, global batch and blocks."""
    alone = references(tiny)
    return lambda kind, batch=16, blocks=8: alone(*settings(kind), f"train.global_batch={batch}", f"model.blocks={blocks}")


@pytest.mark.parametrize("name", [pytest.param("1f1b", marks=pytest.mark.slow), "dualpipe"])
@pytest.mark.parametrize("kind", ["hc", "isohc", "hybrid", "harmonized", "harmonized residual.static=true"])
def test_the_whole_family_equals_one_process(tiny, reference, kind, name):
    """Harmonized aims at a gain of 1, so that the evaluation after the step shows an s that the feedback has moved."""
    expected = reference(kind, 8)
    check_layout(tiny, expected, 4, f"schedule.name={name}", "parallel.pp=4", "train.global_batch=8", *settings(kind))
    gain, s = expected[6]["gain"], expected[7]
    assert gain > 1 - 1e-6 and (s < 1) == ("harmonized" in kind and gain > 1)


def gradients_of_lambda(rank, path, overrides):
    """Of one step, by name, with connections that treat streams unlike each other: their gradients are then large."""
    from pipehc.data.batches import Sampler
    from pipehc.trainer import Trainer

    split = RandomSplit(11)
    trainer = Trainer(load_config(path, overrides))
    with torch.no_grad():
        for model in trainer.models.values():
            for name, parameter in model.named_parameters():
                if name.endswith("connection.bias"):
                    parameter += torch.linspace(-1, 1, len(parameter)).roll(4)
    gradients = watch_gradients(trainer.optimizer)
    trainer.step(1, split, Sampler(len(split), seed=3))
    return {name: float(gradient) for name, gradient in gradients.items() if name.endswith("blend_logit")}


@pytest.mark.parametrize("name", [pytest.param("1f1b", marks=pytest.mark.slow), "dualpipe"])
def test_the_gradient_of_lambda_equals_that_of_one_process(tiny, name):
    """Where all streams are equal, as they enter the model, it is 0, and where they nearly are it is what is left when large terms
    cancel: there the comparison of all gradients allows more."""
    small = "train.global_batch=8", "model.blocks=4", *settings("hybrid")
    (expected,) = run_ranks(gradients_of_lambda, 1, tiny, small, timeout=240)
    overrides = [f"schedule.name={name}", "parallel.pp=4", *small]
    found = run_ranks(gradients_of_lambda, 4, tiny, overrides, timeout=240)
    assert {key for of_rank in found for key in of_rank} == expected.keys() and len(expected) == 8
    first = min(expected, key=lambda key: abs(expected[key]))
    assert "layers.0.attention" in first
    for of_rank in found:
        for key, gradient in of_rank.items():
            if key == first:
                assert abs(gradient) < 1e-3 * min(abs(g) for k, g in expected.items() if k != first)
            else:
                assert gradient == pytest.approx(expected[key], rel=1e-3, abs=0), key


def settings(kind):
    return [*f"residual.kind={kind}".split(), "residual.target_gain=1"]


def check_layout(tiny, expected, processes, *overrides):
    compare(run_ranks(one_step, processes, tiny, overrides, timeout=240), expected, overrides)


@pytest.mark.parametrize(("kind", "ep"), [pytest.param("none", 2, marks=pytest.mark.slow), ("mhc", 1), ("mhc", 2)])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_equals_one_process(tiny, reference, name, pp, ep, kind):
    """Without data parallelism but for what ep needs. P = 2 matters: next and previous are the same rank."""
    batch, blocks = 8 * ep, 8 if name == "dualpipev" else 4  # two blocks a stage, and one
    layout = f"schedule.name={name}", f"parallel.pp={pp}", f"parallel.ep={ep}", f"residual.kind={kind}", f"model.blocks={blocks}"
    check_layout(tiny, reference(kind, batch, blocks), pp * ep, *layout, f"train.global_batch={batch}")


AUTO = "auto search.time_limit=0.5 search.placement="
QUICK = ["interleaved", "zbv schedule.deferred=[ffn]"]
SLOW = ["gpipe", "zbv", "zb_h1 schedule.deferred=[attention]", "zb_h1 schedule.deferred=[]"]
SLOW += [AUTO + "bidirectional"]  # other placements of auto: tests/schedules/test_random_schedules.py


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_other_schedule_equals_one_process(tiny, reference, name):
    """With recomputation, and gradients summed in many buckets."""
    more = "parallel.pp=4", "recompute.enabled=true", "runtime.bucket_size=3000", "train.global_batch=8"
    check_layout(tiny, reference("mhc", 8), 4, *f"schedule.name={name}".split(), *more)


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        pytest.param("1f1b", "mhc", "null", marks=pytest.mark.slow),
        pytest.param("dualpipe", "none", 3, marks=pytest.mark.slow),
        pytest.param("dualpipe", "mhc", "null", marks=pytest.mark.slow),
        ("dualpipev", "mhc", 3),
        pytest.param("interleaved", "mhc", 1, marks=pytest.mark.slow),
        pytest.param("zbv", "mhc", "null", marks=pytest.mark.slow),
    ],
)
def test_overlap_and_recomputation_change_no_bit(tiny, reference, name, kind, block):
    """Recomputation of a whole stage at a time, or of 3 sub-layers, of which no stage has a multiple; uneven stages in a pair."""
    layout = f"schedule.name={name}", "parallel.pp=2", "parallel.ep=2", f"residual.kind={kind}", f"recompute.block={block}"
    blocks = 8 if name == "dualpipev" else 5
    layout += "train.global_batch=8", f"model.blocks={blocks}"
    if name == "dualpipe":
        layout += ("parallel.blocks_per_stage=[2,3]",)
    plain = None
    for overlap in ("false", "true") if name.startswith("dualpipe") else ("true",):
        for recompute in ("false", "true"):
            overrides = *layout, f"runtime.overlap={overlap}", f"recompute.enabled={recompute}"
            results = run_ranks(one_step, 4, tiny, overrides, timeout=240)
            if plain is None:
                compare(results, reference(kind, 8, blocks), overrides)
                plain = results
            for expected, found in zip(plain, results):
                assert found[:4] == expected[:4], overrides
                assert found[4].keys() == expected[4].keys() and expected[4]
                for gradient, same in zip(found[4].values(), expected[4].values()):
                    assert torch.equal(gradient, same), overrides


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("schedule.name=dualpipe residual.kind=harmonized", marks=pytest.mark.slow),
        *(
            pytest.param(f"schedule.name={layout}", marks=pytest.mark.slow)
            for layout in (
                "dualpipe residual.kind=hc residual.exit=sum recompute.block=2",
                "dualpipe residual.kind=mhc train.precision=bf16 runtime.bucket_size=3000",
                "dualpipev residual.kind=isohc recompute.block=1",
                "dualpipev residual.kind=mhc residual.fixed=[res] model.dense_blocks=3 train.precision=bf16",
                "interleaved residual.kind=harmonized residual.static=true recompute.block=3",
                "zbv residual.kind=hybrid model.dense_blocks=5 parallel.ep=1",
                "zb_h1 residual.kind=hybrid residual.fixed=[pre] model.experts_shared=0",
                "gpipe residual.kind=mhc train.micro_batch=2",
            )
        ),
    ],
)
def test_overlap_and_recomputation_change_no_bit_whatever_else_is_set(tiny, layout):
    small = "parallel.pp=2", "parallel.ep=2", "model.blocks=5"
    layout = [*small, *("train.global_batch=8",) * ("micro_batch" not in layout), *layout.split()]
    processes = 2 if "parallel.ep=1" in layout else 4
    off, on = (
        run_ranks(one_step, processes, tiny, [*layout, f"runtime.overlap={on}", f"recompute.enabled={on}"], timeout=240)
        for on in ("false", "true")
    )
    for expected, found in zip(off, on):
        assert found[:4] == expected[:4] and found[6:] == expected[6:]
        assert found[4].keys() == expected[4].keys() and expected[4]
        assert all(torch.equal(gradient, expected[4][name]) for name, gradient in found[4].items())
        assert all(torch.equal(bias, expected[5][name]) for name, bias in found[5].items())


WIDE = "evaluation.samples=8", "model.blocks=4"


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_equals_one_process_with_data_parallelism(tiny, name):
    (expected,) = run_ranks(one_step, 1, tiny, WIDE, timeout=240)
    check_layout(tiny, expected, 8, f"schedule.name={name}", "parallel.pp=2", "parallel.ep=2", "parallel.dp=4", *WIDE)


def one_step_through_host_memory(rank, path, overrides, store):
    from pipehc.comm.host_group import HOST, register

    register()
    size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(HOST, store=dist.FileStore(str(store), size), rank=rank, world_size=size)
    return one_step(rank, path, [*overrides, "runtime.transport=host"])


@pytest.mark.parametrize(
    ("layout", "processes"),
    [
        ("schedule.name=dualpipe parallel.ep=2", 4),
        pytest.param("schedule.name=dualpipe train.precision=bf16 runtime.bucket_size=3000", 4, marks=pytest.mark.slow),
        pytest.param("schedule.name=1f1b residual.kind=harmonized", 2, marks=pytest.mark.slow),
    ],
)
def test_host_transport_changes_no_bit(tiny, tmp_path, layout, processes):
    """Neither of messages and all-to-alls nor of sums over replicas, the optimizer's gathers and the gain."""
    overrides = [*layout.split(), "parallel.pp=2", "model.blocks=4", "train.global_batch=8", "recompute.enabled=true"]
    device = run_ranks(one_step, processes, tiny, overrides, timeout=240)
    host = run_ranks(one_step_through_host_memory, processes, tiny, overrides, tmp_path / "store", init=False, timeout=240)
    for expected, found in zip(device, host):
        assert found[:4] == expected[:4] and found[6:] == expected[6:]
        for values, own in ((expected[4], found[4]), (expected[5], found[5])):
            assert values and own.keys() == values.keys() and all(torch.equal(own[name], value) for name, value in values.items())


@pytest.mark.slow
def test_dualpipe_over_eight_ranks(tiny, reference):
    check_layout(tiny, reference("mhc", 20), 8, "schedule.name=dualpipe", "parallel.pp=8", "train.global_batch=20")
