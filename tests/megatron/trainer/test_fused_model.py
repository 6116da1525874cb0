"""The model with its parts fused is the model without: losses and gradients, and W apart from the backward."""

import pytest
import torch
from processes import run_ranks
from tiny_model import micro_batch, tiny_config

from pipehc.megatron.trainer.groups import build_groups
from pipehc.megatron.trainer.model import build_stage, initialise, parameter_names
from pipehc.megatron.wgrad import install_deferral
from pipehc.model.wgrad import WeightGradStore

SIZES = {"tiny": (), "one sequence": ("train.micro_batch=1",), "even sizes": ("model.head_dim=16", "model.rope_dim=8")}


def outcome(config, groups, fused, deferred=False, modules=()):
    """(loss, gradients by name) of one micro-batch of the whole model."""
    runtime = config.runtime.model_copy(update={"fused": fused})
    recompute = config.recompute.model_copy(update={"modules": modules})
    config = config.model_copy(update={"runtime": runtime, "recompute": recompute})
    model = build_stage(config, groups, range(config.model.blocks), True, True)
    initialise(model, 7, 0.2)
    store = WeightGradStore()
    if deferred:
        install_deferral(model)
        with store.deferring():
            loss = model(None, *micro_batch(config, 0))
    else:
        loss = model(None, *micro_batch(config, 0))
    with store.receiving():
        loss.backward()
    assert (len(store) > 0) == deferred
    store.flush()
    return loss.item(), {name: p.grad for name, p in parameter_names(model).items()}


@pytest.mark.parametrize("residual", ["none", "mhc"])
@pytest.mark.parametrize("sizes", SIZES)
def test_losses_and_gradients_are_those_of_the_plain_model(residual, sizes):
    config = tiny_config(f"residual.kind={residual}", *SIZES[sizes])

    def both(rank):
        groups = build_groups(1, 1, 1, False)
        return [outcome(config, groups, *how) for how in ((True,), (False,), (True, True), (True, True, ("mla_up_proj",)))]

    [[(loss, found), (plain_loss, plain), (deferred_loss, deferred), (rebuilt_loss, rebuilt)]] = run_ranks(both, 1)
    # The sum of a norm is taken in another order.
    assert loss == pytest.approx(plain_loss, rel=1e-6) and deferred_loss == rebuilt_loss == loss
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-7)
        assert torch.equal(deferred[name], found[name]) and torch.equal(rebuilt[name], found[name]), name
