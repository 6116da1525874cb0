"""The gradient norm: the value that Megatron computes, and one look at the device for all parameters."""

import pytest
import torch
from processes import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from pipehc.megatron.gradient_norm import gradient_norm, local_l2_norm


class HostReads(TorchDispatchMode):
    """Counts how often a number is taken out of a tensor: on a GPU the host then waits for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def gradients(rank=0, number=40):
    generator = torch.Generator().manual_seed(rank)
    sizes = [1, 3, 24, 1000, 70000]
    return [torch.randn(sizes[k % 5], generator=generator) * 10.0 ** (k % 7 - 4) for k in range(number)]


def test_one_look_and_the_norm_over_all_ranks():
    def norm(rank):
        with HostReads() as reads:
            found = gradient_norm(gradients(rank) if rank else [], torch.device("cpu"))
        return found, reads.count

    expected = torch.cat([g.double() for rank in (1, 2) for g in gradients(rank)]).norm().item()
    results = run_ranks(norm, 3)  # one of them has none
    assert {count for _, count in results} == {1} and len({found for found, _ in results}) == 1
    assert results[0][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    def norm(rank):
        return gradient_norm([torch.tensor([1.0, bad])], torch.device("cpu"))

    assert str(run_ranks(norm, 1)[0]) == str(bad)


def test_a_jobs_norm_is_megatrons_with_one_look():
    def norms(rank):
        from megatron.core.optimizer import clip_grads

        import pipehc.megatron
        from pipehc.megatron import cpu

        cpu.install()
        found = []
        upstream = clip_grads.l2_norm_impl
        for enabled in (False, True):
            context = pipehc.megatron.enable("1f1b") if enabled else None
            assert (clip_grads.l2_norm_impl is local_l2_norm) == enabled
            with HostReads() as reads:
                norm = clip_grads.get_grad_norm_fp32(gradients(), grad_stats_parallel_group=torch.distributed.group.WORLD)
            found.append((norm, reads.count))
            if context is not None:
                context.disable()
        assert clip_grads.l2_norm_impl is upstream
        return found

    [((theirs, reads), (ours, own_reads))] = run_ranks(norms, 1)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert own_reads == 1 < reads  # and those of `torch.tensor`, one for every parameter, that no mode sees


def test_a_step_of_the_trainers_optimizer_takes_one_look_before_it_updates(monkeypatch):
    def step(rank):
        from tiny_model import tiny_config

        from pipehc.megatron.trainer.groups import build_groups
        from pipehc.megatron.trainer.model import build_stage, initialise
        from pipehc.megatron.trainer.optimizer import build_optimizer

        config = tiny_config("parallel.ep=2")
        groups = build_groups(1, 1, 2, False)
        model = build_stage(config, groups, range(4), True, True)
        initialise(model, 7, 0.1)
        optimizer = build_optimizer(config, groups, [model])
        optimizer.zero_grad()
        for k, parameter in enumerate(model.parameters()):
            parameter.main_grad.fill_(1e-3 * (k + rank))
        optimizer.reduce_gradients()
        optimizer._megatron.prepare_grads()
        expected = float(optimizer._megatron.get_grad_norm())
        for part in optimizer._parts:
            part.optimizer.step = lambda: None  # torch's AdamW asks for its step count, which is on the host
        with HostReads() as reads:
            found = optimizer.step(0.1)
        assert len(optimizer._parts) == 2  # dense, and experts
        return found, expected, reads.count

    for found, expected, reads in run_ranks(step, 2):
        assert found == pytest.approx(expected, rel=1e-6) and reads == 1
