"""Weight gradients split off the backward: nothing early, nothing lost, not a bit different."""

import threading
from collections import Counter

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from processes import run_ranks
from tiny_model import micro_batch, tiny_config

from pipehc.megatron.trainer.groups import build_groups
from pipehc.megatron.trainer.model import StageModel, build_stage, initialise, parameter_names
from pipehc.megatron.wgrad import install_deferral
from pipehc.model.wgrad import Accumulate, WeightGradStore, linear

CONFIG = tiny_config()
IGNORE = Accumulate(lambda gradient: None)
AT_ONCE = ("embedding", "layernorm", "router", "connection")  # parameters whose gradients autograd computes


@pytest.fixture
def layer():
    """(x [2, 3, 5], weight [4, 5], gradient of the output, and what autograd gives for both), fp64."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 3, 5), (4, 5), (2, 3, 4)))
    torch.nn.functional.linear(x.requires_grad_(), weight.requires_grad_()).backward(dy)
    expected = x.grad, weight.grad
    x.grad = weight.grad = None
    return x, weight, dy, *expected


def test_linear_without_a_store_is_autograd(layer):
    x, weight, dy, dx, dw = layer
    found = []
    linear(x, weight, Accumulate(found.append)).backward(dy)
    torch.testing.assert_close(x.grad, dx, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found, [dw], rtol=1e-14, atol=1e-14)
    assert weight.grad is None


def test_store_keeps_weight_gradients_until_flushed(layer):
    x, weight, dy, dx, dw = layer
    found, store = [], WeightGradStore()
    with store.deferring():
        y = linear(x, weight, Accumulate(found.append))
    y.backward(dy)
    torch.testing.assert_close(x.grad, dx, rtol=1e-14, atol=1e-14)
    assert (len(store), found) == (1, [])
    store.flush()
    torch.testing.assert_close(found, [dw], rtol=1e-14, atol=1e-14)
    store.flush()
    assert (len(store), len(found)) == (0, 1)


def test_an_input_without_gradient_still_owes_the_weights(layer):
    x, weight, dy, _, dw = layer
    found, store = [], WeightGradStore()
    with store.deferring():
        y = linear(x.detach(), weight, Accumulate(found.append))
    y.backward(dy)
    store.flush()
    torch.testing.assert_close(found, [dw], rtol=1e-14, atol=1e-14)


def test_store_of_the_forward_counts_whatever_is_open_later(layer):
    x, weight, dy, _, _ = layer
    a, b = WeightGradStore(), WeightGradStore()
    with a.deferring():
        y = linear(x, weight, IGNORE)
    with b.deferring():
        thread = threading.Thread(target=y.backward, args=(dy,))  # as CUDA's backward, in a thread with a context of its own
        thread.start()
        thread.join()
    assert (len(a), len(b)) == (1, 0)


def test_stores_nest(layer):
    x, weight, dy, _, _ = layer
    outer, inner = WeightGradStore(), WeightGradStore()
    with outer.deferring():
        with inner.deferring():
            first = linear(x, weight, IGNORE)
        second = linear(x, weight, IGNORE)
    first.backward(dy)
    assert (len(outer), len(inner)) == (0, 1)
    second.backward(dy)
    assert (len(outer), len(inner)) == (1, 1)


def test_flush_frees_what_it_held():
    freed = []

    class Held:
        def __del__(self):
            freed.append(True)

    def owe(store):
        held = Held()
        store.put(lambda: held)

    store = WeightGradStore()
    owe(store)
    store.put(lambda: freed.append("second"))
    store.flush()
    assert freed == [True, "second"]


def stage(groups) -> StageModel:
    model = build_stage(CONFIG, groups, range(CONFIG.model.blocks), True, True)
    initialise(model, 3, 0.1)
    return model


def wrapped(groups, overlap: bool = False) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=False)
    model = stage(groups)
    return DistributedDataParallel(model.config, settings, model, disable_bucketing=True, pg_collection=groups.collection)


def main_gradients(ddp: DistributedDataParallel) -> dict[str, torch.Tensor]:
    return {name: p.main_grad.clone() for name, p in parameter_names(ddp.module).items()}


def gradients_of_upstream(groups, batches):
    """As Megatron's own backward leaves them."""
    ddp = wrapped(groups)
    for batch in batches:
        ddp.module(None, *batch).backward()
    return main_gradients(ddp)


def test_products_add_themselves():
    """As exact as upstream's sums, in another order; DDP's hook counts every gradient, and adds none twice."""

    def compare(rank):
        groups = build_groups(1, 1, 1, False)
        batches = [micro_batch(CONFIG, i) for i in range(3)]
        upstream = gradients_of_upstream(groups, batches)
        ddp = wrapped(groups, overlap=True)
        install_deferral(ddp, add_products=True)
        counted = Counter()
        for group in ddp.bucket_groups:
            group.register_grad_ready = lambda parameter, _: counted.update([parameter])
        store = WeightGradStore()
        for batch in batches:
            with store.deferring():
                loss = ddp.module(None, *batch)
            loss.backward()
        store.flush()
        named = parameter_names(ddp.module)
        assert {counted[p] for p in named.values()} == {len(batches)}
        assert all(p.grad is None and not p.grad_added_to_main_grad for p in named.values())
        for name, gradient in main_gradients(ddp).items():
            assert (gradient - upstream[name]).norm() <= 1e-5 * upstream[name].norm(), name
        return True

    assert run_ranks(compare, 1) == [True]


def test_split_backward_is_bit_equal():
    def compare(rank):
        groups = build_groups(1, 1, 1, False)
        batches = [micro_batch(CONFIG, i) for i in range(3)]
        upstream = gradients_of_upstream(groups, batches)

        ddp = wrapped(groups)
        install_deferral(ddp)
        layers = sum(isinstance(m, ColumnParallelLinear | RowParallelLinear) for m in ddp.modules())
        for batch in batches:
            ddp.module(None, *batch).backward()
        for name, gradient in main_gradients(ddp).items():
            assert torch.equal(gradient, upstream[name]), f"without a store: {name}"

        ddp.zero_grad_buffer()
        stores = [WeightGradStore() for _ in batches]
        losses = []
        for store, batch in zip(stores, batches):
            with store.deferring():
                losses.append(ddp.module(None, *batch))
        for loss in losses:
            loss.backward()
        assert [len(store) for store in stores] == [layers] * 3
        for name, gradient in main_gradients(ddp).items():
            assert gradient.any() == any(part in name for part in AT_ONCE), f"before W: {name}"
        for store in stores:
            store.flush()
        for name, gradient in main_gradients(ddp).items():
            assert torch.equal(gradient, upstream[name]), f"after W: {name}"
        assert all(p.grad is None for p in ddp.parameters())

    run_ranks(compare, 1)


def test_micro_batches_may_be_flushed_in_any_order():
    def compare(rank):
        ddp = wrapped(build_groups(1, 1, 1, False))
        install_deferral(ddp)
        found = []
        for order in ((0, 1), (1, 0)):
            ddp.zero_grad_buffer()
            stores = [WeightGradStore(), WeightGradStore()]
            for i, store in enumerate(stores):
                with store.deferring():
                    loss = ddp.module(None, *micro_batch(CONFIG, i))
                loss.backward()
            for i in order:
                stores[i].flush()
            found.append(main_gradients(ddp))
        for name, gradient in found[0].items():
            assert torch.equal(gradient, found[1][name]), name  # a + b and b + a

    run_ranks(compare, 1)


def test_a_module_without_ddp_gets_its_gradients_in_grad():
    def compare(rank):
        groups = build_groups(1, 1, 1, False)
        plain, split = stage(groups), stage(groups)
        install_deferral(split)
        for index in range(2):
            plain(None, *micro_batch(CONFIG, index)).backward()
            store = WeightGradStore()
            with store.deferring():
                loss = split(None, *micro_batch(CONFIG, index))
            loss.backward()
            store.flush()
        for name, parameter in parameter_names(split).items():
            assert torch.equal(parameter.grad, parameter_names(plain)[name].grad), name

    run_ranks(compare, 1)


def test_overlapped_reduction_waits_for_the_weight_gradients():
    """DDP starts the all-reduce of a bucket when its last gradient is ready: with deferral, that is in W and not in I."""

    def compare(rank):
        groups = build_groups(1, 1, 1, False)
        reference, ddp = wrapped(groups), wrapped(groups, overlap=True)
        install_deferral(ddp)
        for step in range(3):  # the first one only counts how often each gradient is ready
            batch = micro_batch(CONFIG, 2 * step + rank)
            reference.zero_grad_buffer()
            reference.module(None, *batch).backward()
            reference.finish_grad_sync()
            ddp.zero_grad_buffer()
            store = WeightGradStore()
            with store.deferring():
                loss = ddp.module(None, *batch)
            loss.backward()
            [bucket] = ddp.bucket_groups
            started = bucket.grad_reduce_handle is not None
            store.flush()
            assert not started
            assert (bucket.grad_reduce_handle is not None) == (step > 0)
            ddp.finish_grad_sync()
            for name, gradient in main_gradients(ddp).items():
                torch.testing.assert_close(gradient, main_gradients(reference)[name], rtol=1e-6, atol=1e-7, msg=name)

    run_ranks(compare, 2)


def test_evaluation_owes_nothing():
    def owed(rank):
        model = stage(build_groups(1, 1, 1, False))
        install_deferral(model)
        store = WeightGradStore()
        with torch.no_grad(), store.deferring():
            loss = model(None, *micro_batch(CONFIG, 0))
        return loss.requires_grad, len(store)

    assert run_ranks(owed, 1) == [(False, 0)]
