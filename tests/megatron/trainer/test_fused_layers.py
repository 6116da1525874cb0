"""The trainer with our feed-forward layers and routing, against Megatron's own; grouped products and rebuilding change no bit."""

import pytest
import torch
from processes import run_ranks
from tiny_model import tiny_config

EXPERTS = ("parallel.pp=1", "parallel.ep=2", "parallel.dp=2", "model.experts=6", "residual.kind=none")


class Split:
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(index))


def one_step(rank, overrides, grouped=False):
    """Loss, gradient norm, gradients; and of every layer of experts whether its products are grouped."""
    from pipehc.data.batches import Sampler
    from pipehc.megatron import feed_forward
    from pipehc.megatron.trainer.capabilities import capabilities, described
    from pipehc.trainer import Trainer

    if grouped:
        feed_forward.why_not_grouped = lambda weight: None  # a CPU runs them, too
    config = tiny_config(*overrides)
    trainer, gradients = Trainer(config), {}
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda lr: gradients.update(trainer.optimizer.gradients()) or step(lr)
    result = trainer.step(1, Split(), Sampler(64, seed=3))
    trainer.check_replicas()
    models = list(trainer.models.values())
    found = {layer.grouped for model in models for layer in model.modules() if isinstance(layer, feed_forward.Experts)}
    return result.loss, result.grad_norm, gradients, found, described(capabilities(config, models))


def equal(found, expected):
    assert found[:2] == expected[:2] and found[2].keys() == expected[2].keys()
    assert all(torch.equal(gradient, expected[2][name]) for name, gradient in found[2].items())


def test_grouped_products_are_those_of_single_experts():
    """Weights of six experts over two ranks lie equally far apart in DDP's buffers; what ends where is known on the device."""
    single, grouped = (run_ranks(one_step, 2, EXPERTS, grouped) for grouped in (False, True))
    for found, expected in zip(grouped, single):
        assert found[3] == {True} and expected[3] == {False}
        equal(found, expected)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_swiglu_made_again_changes_no_bit(precision):
    layout = (*EXPERTS, f"train.precision={precision}")
    kept, again = (run_ranks(one_step, 2, [*layout, *more]) for more in ((), ("recompute.modules=[swiglu]",)))
    for found, expected in zip(again, kept):
        equal(found, expected)


ALONE = [("model.experts_shared=0",), ("model.experts_active=1", "model.dense_blocks=0")]


@pytest.mark.parametrize("layout", [EXPERTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in ALONE)])
def test_megatrons_own_layers_compute_the_same(layout):
    """In fp32, to the order of sums over micro-batches."""
    processes = 2 if layout is EXPERTS else 1
    own, theirs = (run_ranks(one_step, processes, [*layout, f"runtime.fused={on}"]) for on in ("true", "false"))
    for found, expected in zip(own, theirs):
        assert found[:2] == pytest.approx(expected[:2], rel=1e-5)
        assert found[2].keys() == expected[2].keys() and len(found[2]) > 10
        for name, gradient in expected[2].items():
            # Three numbers of alpha, each left over when large terms cancel: 1e-7 of a gradient norm of 1, and less.
            floor = 1e-10 * expected[1] if name.endswith(".alpha") else 0
            assert (found[2][name] - gradient).norm() <= 1e-5 * gradient.norm() + floor, name
        assert expected[3] == set() and expected[4].startswith("without: ") and expected[4].count("runtime.fused is false") == 5
        assert "layers with: feed-forward" in found[4] and "experts in grouped products (on a CPU" in found[4]
