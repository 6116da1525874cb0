"""Deferred weight gradients of TransformerEngine's layers, for which a stand-in with their protocol runs here."""

import warnings
from types import SimpleNamespace

import megatron_job
import pytest
import torch
from processes import run_ranks
from te_stand_in import MegatronLinear, put_te_layers
from test_megatron_schedule import ORACLE

from pipehc.megatron.wgrad import install_deferral
from pipehc.model.wgrad import WeightGradStore
from pipehc.schedules import Action, Schedule, build


def layer(config=None, **options):
    config = config or SimpleNamespace(defer_embedding_wgrad_compute=False, tp_comm_overlap=False, delay_wgrad_compute=False)
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    return MegatronLinear(config, weight, **{"bias": False, "fuse": False} | options)


def test_weight_gradients_wait_and_come_in_any_order():
    model, x = layer(), torch.randn(2, 4, 3)
    install_deferral(model)
    stores = [WeightGradStore(), WeightGradStore()]
    for store, part in zip(stores, x):
        with store.deferring():
            y, _ = model(part)
        y.sum().backward()
        assert len(store) == 1 and model.weight.grad is None
    expected = [part.sum(0).expand(2, 3) for part in x]
    stores[1].flush()
    assert torch.equal(model.weight.grad, expected[1])
    stores[0].flush()
    assert torch.equal(model.weight.grad, expected[1] + expected[0])

    model.weight.grad = None
    model(x[0])[0].sum().backward()  # without a store
    assert torch.equal(model.weight.grad, expected[0])


def test_evaluation_owes_nothing():
    model, store = layer(), WeightGradStore()
    install_deferral(model)
    with torch.no_grad(), store.deferring():
        model(torch.ones(1, 3))
    assert not model.wgrad_store.delay_wgrad_compute() and len(store) == 0


@pytest.mark.parametrize(
    ("options", "setting", "reason"),
    [({"bias": True}, {}, "of a bias together"), ({}, {"tp_comm_overlap": True}, "tp_comm_overlap exchanges")],
)
def test_what_te_cannot_delay_comes_at_once(options, setting, reason):
    model, store = layer(**options), WeightGradStore()
    for name, value in setting.items():
        setattr(model.config, name, value)
    with pytest.warns(UserWarning, match=f"1 TransformerEngine layers compute their weight gradients in the backward.*{reason}"):
        install_deferral(model)
    with store.deferring():
        y, _ = model(torch.ones(1, 3))
    y.sum().backward()
    assert len(store) == 0 and model.weight.grad is not None


def test_frozen_layers_are_left_alone():
    model, store = layer(), WeightGradStore()
    model.weight.requires_grad_(False)
    install_deferral(model)
    with store.deferring():
        model(torch.ones(1, 3, requires_grad=True))[0].sum().backward()
    assert len(store) == 0


def last_forward_first(microbatches):
    """One rank, backwards in the opposite order: what TE would overwrite in the first micro-batch is not zero."""
    whole = build("gpipe", 1, microbatches)
    forwards = [Action("F", 0, m) for m in range(microbatches)]
    backwards = [Action("B", 0, m) for m in reversed(range(microbatches))]
    return Schedule("reversed", whole.placement, microbatches, ((*forwards, *backwards),))


def train(rank, arguments, fuse):
    plain = megatron_job.provider

    def provider(config, **options):
        build_plain = plain(config, **options)
        return lambda **given: put_te_layers(build_plain(**given), fuse=fuse)

    megatron_job.provider = provider
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, _ = megatron_job.train(rank, arguments)
    return found, [str(w.message) for w in said if "TransformerEngine layers" in str(w.message)]


OVERLAPPED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "bucket_size": 20000}
DUALPIPE = {"schedule": "dualpipe", "pp": 2}


@pytest.mark.parametrize(
    ("processes", "arguments", "fuse"),
    [
        pytest.param(2, DUALPIPE, True, id="dualpipe"),
        pytest.param(1, {"schedule": last_forward_first(8)}, True, id="reversed"),
        pytest.param(2, DUALPIPE, False, id="dualpipe without fusion", marks=pytest.mark.slow),
        pytest.param(2, {"schedule": "zbv", "pp": 2, "vpp": 2}, True, id="zbv", marks=pytest.mark.slow),
        pytest.param(4, {**DUALPIPE, "ep": 2, **OVERLAPPED}, True, id="overlapped", marks=pytest.mark.slow),
        pytest.param(4, {**DUALPIPE, "ep": 2, **OVERLAPPED}, False, id="overlapped without fusion", marks=pytest.mark.slow),
    ],
)
def test_jobs_equal_those_of_local_layers(processes, arguments, fuse):
    for rank, (steps, said) in enumerate(run_ranks(train, processes, arguments, fuse, timeout=240)):
        for (loss, norm), (other_loss, other_norm) in zip(steps, ORACLE, strict=True):
            assert loss == pytest.approx(other_loss, abs=1e-6)
            assert norm == pytest.approx(other_norm, rel=1e-5)
        at_once = "overlap_grad_reduce" in arguments and not fuse
        assert bool(said) == (at_once and rank == 0)
        assert all("overlap_grad_reduce without gradient_accumulation_fusion" in text for text in said)
