"""Every gradient is accounted for: no bucket is summed before all that is owed to it has landed, none twice, none is forgotten."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipehc.megatron.buckets import BucketReduction


class Group:
    """One of DDP's bucket groups."""

    def __init__(self, name, parameters, started):
        self.params = set(parameters)
        self.start_grad_sync = lambda: started.append(name)


class Chunk:
    """A stage in DDP."""

    def __init__(self, module, dense, experts):
        self.module, self.bucket_groups, self.expert_parallel_bucket_groups = module, dense, experts


@pytest.fixture
def job():
    """A stage of three layers with weight and bias, each its own bucket; what has been started, and the reduction in a step."""
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    started = []
    groups = [Group(f"layer {i}", layer.parameters(), started) for i, layer in enumerate(module)]
    chunk = Chunk(module, groups[:0:-1], groups[:1])
    reduction = BucketReduction()
    reduction.watch(chunk)
    reduction.begin_step()
    return SimpleNamespace(module=module, chunk=chunk, started=started, reduction=reduction)


def test_a_bucket_goes_when_all_that_is_owed_to_it_has_landed(job):
    first, middle, last = job.module
    owed = [last.weight, last.bias, middle.weight, first.weight, first.weight, first.bias]  # one weight has two uses
    for parameter in owed:
        job.reduction.owe(parameter)
    assert job.started == []
    job.reduction.expect_last(job.chunk)
    seen = []
    for parameter in owed:
        job.reduction.landed(parameter)
        seen.append(len(job.started))
    assert seen == [0, 1, 2, 2, 2, 3] and job.started == ["layer 2", "layer 1", "layer 0"]
    job.reduction.start(job.chunk)
    job.reduction.end_step([job.chunk])
    assert len(job.started) == 3


def test_buckets_keep_their_order_whatever_lands_first(job):
    first, _, last = job.module
    for parameter in (first.weight, last.weight):
        job.reduction.owe(parameter)
    job.reduction.expect_last(job.chunk)
    job.reduction.landed(first.weight)
    assert job.started == []
    job.reduction.landed(last.weight)
    assert job.started == ["layer 2", "layer 1", "layer 0"]


def test_nothing_is_owed_to_what_autograd_alone_fills(job):
    """Frozen parameters, experts without a token, norms."""
    job.reduction.expect_last(job.chunk)
    assert job.started == ["layer 2", "layer 1", "layer 0"]


def test_without_a_last_w_all_go_at_once(job):
    job.reduction.owe(job.module[0].weight)
    job.reduction.landed(job.module[0].weight)
    assert job.started == []
    job.reduction.start(job.chunk)
    assert job.started == ["layer 2", "layer 1", "layer 0"]


def test_a_sum_before_the_last_gradient_is_found(job):
    job.reduction.owe(job.module[0].bias)
    with pytest.raises(AssertionError, match=r"bucket of 0\.weight is summed before 1 of its gradients"):
        job.reduction.start(job.chunk)
    assert job.started == ["layer 2", "layer 1"]


def test_a_sum_by_the_job_before_the_last_gradient_is_found(job):
    job.reduction.owe(job.module[2].bias)
    with pytest.raises(AssertionError, match="summed before 1"):
        job.reduction.start(job.chunk, lambda: job.started.append("all"))
    assert job.started == []


@pytest.mark.parametrize("by_autograd", [False, True])
def test_a_gradient_after_the_sum_is_found(job, by_autograd):
    job.reduction.start(job.chunk)
    with pytest.raises(AssertionError, match=r"a gradient for the bucket of 2\.weight comes after its sum has begun"):
        if by_autograd:
            job.module[2](torch.ones(1, 2)).sum().backward()
        else:
            job.reduction.owe(job.module[2].bias)


def test_a_second_sum_is_found(job):
    job.reduction.start(job.chunk, lambda: None)
    with pytest.raises(AssertionError, match="summed twice"):
        job.reduction.start(job.chunk, lambda: None)


def test_a_forgotten_sum_is_found(job):
    with pytest.raises(AssertionError, match=r"the bucket of 2\.weight is not summed"):
        job.reduction.end_step([job.chunk])


def test_a_forgotten_weight_gradient_is_found(job):
    job.reduction.owe(nn.Parameter(torch.ones(1)))  # of a stage that the optimizer sums by itself
    with pytest.raises(AssertionError, match="1 weight gradients that the step owes"):
        job.reduction.end_step([])


def test_steps_end_and_interrupted_ones_are_forgotten(job):
    with pytest.raises(KeyError), job.reduction.step([job.chunk]):
        job.reduction.owe(job.module[0].weight)
        job.reduction.expect_last(job.chunk)
        raise KeyError
    for _ in range(2):
        with job.reduction.step([job.chunk]):
            job.module(torch.ones(1, 2)).sum().backward()
            job.reduction.start(job.chunk)
        job.module(torch.ones(1, 2)).sum().backward()  # between steps: not ours
    assert job.started == ["layer 2", "layer 1"] + 2 * ["layer 2", "layer 1", "layer 0"]


class CheckedGroup(Group):
    """With one bucket of gradients, and Megatron's check as far as it matters here."""

    def __init__(self, name, parameters, started, value=1.0):
        super().__init__(name, parameters, started)
        self.buckets = [SimpleNamespace(grad_data=torch.tensor([3.0, value]))]

    def check_grads(self, check_for_nan_or_inf, check_for_large):
        for bucket in self.buckets:
            norm = bucket.grad_data.norm(p=2)
            assert check_for_nan_or_inf and not check_for_large
            if torch.isnan(norm) or torch.isinf(norm):
                raise RuntimeError(f"found {norm}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norms_are_checked_at_the_end_of_the_step(bad):
    layers = [nn.Linear(2, 2) for _ in range(3)]
    groups = [CheckedGroup("", layer.parameters(), [], value) for layer, value in zip(layers, (4.0, bad, 4.0))]
    reduction = BucketReduction()
    reduction.watch(Chunk(nn.Sequential(*layers), groups, []))
    what = {"check_for_nan_or_inf": True, "check_for_large": False}
    reduction.begin_step()
    for group in groups:
        group.check_grads(**what)  # as start_grad_sync does
        group.buckets[0].grad_data.zero_()  # what is summed afterwards does not matter
    with pytest.raises(RuntimeError, match=f"found {bad}"):
        reduction.checks.finish()
    reduction.checks.finish()  # once is enough
    groups[1].buckets[0].grad_data.fill_(bad)
    with pytest.raises(RuntimeError, match=f"found {bad}"):
        groups[1].check_grads(**what)  # outside of our steps: at once
    reduction.begin_step()
    groups[0].check_grads(**what)
    reduction.checks.finish()
