"""Recomputation: equal to the bit, F never runs twice, and the bytes kept are those of the paper's table 3."""

import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from processes import run_ranks
from tiny_model import micro_batch, tiny_config

from pipehc.comm.queues import HostQueue, make_queues
from pipehc.megatron.trainer.groups import build_groups
from pipehc.megatron.trainer.model import StageModel, build_stage, initialise, parameter_names
from pipehc.megatron.wgrad import install_deferral
from pipehc.model.sublayers import CONTEXT
from pipehc.model.wgrad import WeightGradStore
from pipehc.recompute import Pass, SavedBytes, cut, memory, optimal_block_size

S, B, N = 11, 2, 3  # the tiny model's sequence, micro-batch and streams
QUEUES = make_queues(torch.device("cpu"))


def stage(groups, *overrides, blocks=range(4), first=True, last=True) -> StageModel:
    model = build_stage(tiny_config("model.init_std=0.2", "residual.alpha=0.3", *overrides), groups, blocks, first, last)
    initialise(model, 5, 0.2)
    install_deferral(model)
    return model


def given(model, microbatch=0):
    tokens, labels = micro_batch(tiny_config(), microbatch)
    streams = torch.randn(S, B, model.config.hidden_size * model.streams, generator=torch.Generator().manual_seed(microbatch))
    first = {"tokens": tokens} if model.first else {"x0": streams}
    return {CONTEXT: None} | first | ({"labels": labels} if model.last else {})


def through_chain(model, block=None, queues=QUEUES, **options):
    """(result, gradient of x0, gradients by name) of one micro-batch, piece by piece."""
    chain, store = model.chain(block), WeightGradStore()
    run = Pass(chain, queues, given(model), scope=store.deferring, **options)
    run.forward_all()
    result = run.result()
    run.seed(chain.result, torch.ones_like(result) if model.last else result.cos())
    run.backward_all()
    gradient = None if model.first else run.gradient("x0")
    store.flush()
    return result, gradient, take_gradients(model)


def in_one_graph(model):
    values = given(model)
    del values[CONTEXT]
    x = values.pop("x0").requires_grad_() if not model.first else None
    store = WeightGradStore()
    with store.deferring():
        result = model(x, **values)
    result.backward(None if model.last else result.detach().cos())
    store.flush()
    return result.detach(), None if x is None else x.grad, take_gradients(model)


def take_gradients(model):
    found = {name: p.grad for name, p in parameter_names(model).items()}
    model.zero_grad()
    return found


def assert_equal(found, expected):
    """To the bit."""
    assert torch.equal(found[0], expected[0])
    assert (found[1] is None and expected[1] is None) or torch.equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert (gradient is None and found[2][name] is None) or torch.equal(found[2][name], gradient), name


def assert_close(found, expected):
    """To rounding: gradients of a value with several uses are summed in another order."""
    pairs = {"result": (found[0], expected[0])} | {name: (found[2][name], g) for name, g in expected[2].items() if g is not None}
    if expected[1] is not None:
        pairs["x0"] = found[1], expected[1]
    assert found[2].keys() == expected[2].keys()
    for name, (tensor, reference) in pairs.items():
        assert (tensor - reference).norm() <= 3e-5 * reference.norm(), name


@pytest.mark.parametrize("kind", ["none", "mhc"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equal_to_the_bit(kind, precision):
    def compare(rank):
        groups = build_groups(1, 1, 1, False)
        for first, last in itertools.product((True, False), repeat=2):
            model = stage(groups, f"residual.kind={kind}", f"train.precision={precision}", first=first, last=last)
            if precision == "bf16" and not first:
                continue  # `given` makes fp32 streams
            expected = in_one_graph(model)
            for block in (None, 1, 3):
                kept = through_chain(model, block)
                if precision == "fp32":
                    assert_close(kept, expected)
                assert_equal(through_chain(model, block, recompute=True), kept)

    run_ranks(compare, 1)


@pytest.mark.parametrize("kind", ["none", "mhc"])
def test_equal_to_the_bit_with_experts_on_two_ranks(kind):
    def compare(rank):
        model = stage(build_groups(1, 1, 2, False), f"residual.kind={kind}", "parallel.ep=2")
        expected = in_one_graph(model)
        kept = through_chain(model, 3)
        assert_close(kept, expected)
        assert_equal(through_chain(model, 3, recompute=True), kept)

    run_ranks(compare, 2)


def test_rebuilding_never_runs_f_and_rebuilds_no_block_twice():
    def count(rank):
        model = stage(build_groups(1, 1, 1, False))
        calls = {"F": 0, "connection": 0}

        def counted(what, function):
            def call(*args, **kwargs):
                calls[what] += 1
                return function(*args, **kwargs)

            return call

        chain = model.chain(3)
        pieces = []
        for piece in chain.pieces:
            what = "connection" if piece.rebuilt else "F"
            again = {key: getattr(piece, key) for key in ("run", "run_again", "for_backward") if getattr(piece, key) is not None}
            pieces.append(replace(piece, **{key: counted(what, function) for key, function in again.items()}))
        chain.pieces = tuple(pieces)
        run = Pass(chain, QUEUES | {"high": HostQueue(late=False)}, given(model), recompute=True)
        run.forward_all()
        after_forward = dict(calls)
        run.seed("loss", torch.ones_like(run.result()))
        run.rebuild()
        last_block = calls["connection"] - after_forward["connection"]
        run.rebuild()
        run.backward_all()
        assert calls["F"] == after_forward["F"] == sum(not piece.rebuilt for piece in pieces)
        assert last_block == 3 and calls["connection"] == 2 * after_forward["connection"]

    run_ranks(count, 1)


@pytest.mark.parametrize("kind", ["none", "mhc"])
@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize("first", [True, False])
def test_bytes_kept_are_those_of_table_3(kind, block, first):
    """nC a block and C a sub-layer, to the byte; what F saves does not depend on recomputation but for its own input."""

    def compare(rank):
        model = stage(build_groups(1, 1, 1, False), f"residual.kind={kind}", "model.hidden_size=256", first=first, last=False)
        persistent = [*model.parameters(), *model.buffers()]
        counts = {}
        for recompute in (False, True):
            counts[recompute] = SavedBytes(persistent)
            through_chain(model, block, recompute=recompute, count=counts[recompute])
        return [(c.inputs, c.outputs, c.by_f, c.by_rebuilt, c.transient) for c in (counts[False], counts[True])]

    [((_, _, by_f_all, by_rebuilt, _), (inputs, outputs, by_f, none, transient))] = run_ranks(compare, 1)
    n = 1 if kind == "none" else N
    channels, sublayers = S * B * 256 * 4, 8  # bytes of C numbers a token in fp32
    blocks = cut(sublayers, block)
    assert (inputs, outputs, none) == (n * channels * len(blocks), sublayers * channels, 0)
    assert by_f_all - by_f == sublayers * channels  # its normalised input
    assert by_rebuilt > sublayers * n * channels
    # Planned are n + 2 times C: the streams, the input of the norm, the input of F. The connection, which does the norm, does not
    # keep its input. The rest, the coefficients, are less than x_l0, which is kept and not rebuilt.
    longest = max(map(len, blocks))
    assert transient <= longest * (n + 2) * channels
    if kind == "mhc":
        assert transient >= longest * (n + 1) * channels - n * channels  # x_l0 is kept, not rebuilt


def test_dropped_tensors_are_freed():
    """After the forward nothing else refers to what is rebuilt: the streams between sub-layers and the inputs of F."""

    def check(rank):
        model = stage(build_groups(1, 1, 1, False), first=False, last=False)
        seen: list[weakref.ref] = []
        for layer in model.decoder.layers.values():
            for connection in (layer.attention_connection, layer.mlp_connection):
                for name in ("coefficients_pre", "post_res_pre", "post_res"):
                    method = getattr(connection, name)

                    def watched(*args, method=method, **options):
                        results = method(*args, **options)
                        made = results if isinstance(results, tuple) else (results,)
                        seen.extend(weakref.ref(t.untyped_storage()) for t in made)
                        return results

                    setattr(connection, name, watched)
        run = Pass(model.chain(None), QUEUES, given(model), recompute=True)
        run.forward_all()
        result = run.result()
        gc.collect()
        alive = [r() for r in seen if r() is not None]
        assert len(seen) >= 8 * 3 and [s.data_ptr() for s in alive] == [result.untyped_storage().data_ptr()]

    run_ranks(check, 1)


def test_a_late_rebuild_is_asked_for_by_the_backward():
    """Also between passes: two micro-batches in flight, one of which got its R."""

    def compare(rank):
        model = stage(build_groups(1, 1, 1, False))
        chain = model.chain(3)
        expected = through_chain(model, 3)
        runs = [Pass(chain, QUEUES, given(model), recompute=True) for _ in range(2)]
        for run in runs:
            run.forward_all()
        runs[1].rebuild()
        for run in runs:
            run.seed("loss", torch.ones_like(run.result()))
            run.backward_all()
            for name, gradient in take_gradients(model).items():
                assert torch.equal(gradient, expected[2][name]), name

    run_ranks(compare, 1)


def test_maps_are_counted_once():
    """Figures of H_res are the forward's: a sum over twice the tokens would round differently."""

    def check(rank):
        model = stage(build_groups(1, 1, 1, False))
        connections = [c for layer in model.decoder.layers.values() for c in (layer.attention_connection, layer.mlp_connection)]
        for connection in connections:
            connection.track = True
        found = []
        for recompute in (False, True):
            through_chain(model, 3, recompute=recompute)
            assert [connection._tokens for connection in connections] == [S * B] * 8
            found.append([connection.take_mean_h_res() for connection in connections])
        assert all(torch.equal(a, b) for a, b in zip(*found))
        assert all(connection.track for connection in connections)

    run_ranks(check, 1)


def test_evaluation_keeps_nothing():
    def check(rank):
        model = stage(build_groups(1, 1, 1, False))
        with torch.no_grad():
            run = Pass(model.chain(), QUEUES, given(model), recompute=True)
            run.forward_all()
            assert not run.result().requires_grad
        return len(run._values), len(run._kept), len(run._graphs)

    assert run_ranks(check, 1) == [(0, 0, 0)]


def test_optimal_block_size_is_the_best_whole_number():
    for n, sublayers, live in itertools.product((1, 2, 4, 8), range(1, 40), (1, 3, 9)):
        best = optimal_block_size(n, sublayers, live=live)
        cost = {size: live * n * sublayers / size + (n + 2) * size for size in range(1, sublayers + 1)}
        assert cost[best] == min(cost.values()), (n, sublayers, live)
    assert optimal_block_size(4, 60) == 6  # sqrt(4 * 60 / 6) = 6.3
    assert optimal_block_size(4, 8, live=9) == 7  # sqrt(9 * 32 / 6) = 6.9: the whole stage is near the best
    with pytest.raises(ValueError, match="L = 0"):
        optimal_block_size(4, 0)


def test_blocks_of_a_stage():
    assert cut(8, None) == [range(8)] == cut(8, 100)
    assert [len(block) for block in cut(8, 3)] == [3, 3, 2]
    assert [len(block) for block in cut(7, 4)] == [4, 3]
    assert memory(4, 8, None, live=9) == (36, 72, 48) and memory(4, 8, None, live=9).total == 156
    assert memory(4, 8, 3, live=1) == (12, 8, 18)
    with pytest.raises(ValueError, match="block = 0"):
        cut(8, 0)
