"""The loss against PyTorch's in fp64 and against Megatron's, which it equals to the bit on one rank; masked labels."""

from functools import partial

import pytest
import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from processes import run_ranks
from tiny_model import tiny_config

from pipehc.megatron.trainer.cross_entropy import cross_entropy, likeliest


def inputs(dtype, scale=3.0, shape=(5, 2, 37)):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(shape, generator=generator)).to(dtype)
    return logits.requires_grad_(), torch.randint(0, shape[-1], shape[:-1], generator=generator)


def loss_and_gradient(f, logits, targets):
    """Of results of a product, which may be overwritten, under a gradient of another size for each token."""
    losses = f(logits * 1, targets)
    weights = torch.linspace(-2, 3, losses.numel(), dtype=losses.dtype).view_as(losses)
    return losses.detach(), *torch.autograd.grad((losses * weights).sum(), logits)


@pytest.mark.parametrize("scale", [0.0, 3.0, 1e3])
def test_equals_pytorch_in_fp64(scale):
    logits, targets = inputs(torch.float64, scale)

    def plain(logits, targets):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    for ours, reference in zip(loss_and_gradient(cross_entropy, logits, targets), loss_and_gradient(plain, logits, targets)):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 2, 37), (1, 1, 4), (3, 1, 300)])
def test_equals_megatron_to_the_bit(dtype, shape):
    def found(rank):
        def plain(logits, targets):
            return vocab_parallel_cross_entropy(logits.float(), targets, tp_group=torch.distributed.group.WORLD)

        given = inputs(dtype, shape=shape)
        pairs = list(zip(loss_and_gradient(cross_entropy, *given), loss_and_gradient(plain, *given)))
        return [(torch.equal(*pair), pair[0].dtype == pair[1].dtype) for pair in pairs]

    assert run_ranks(found, 1) == [[(True, True), (True, True)]]


def test_gradients_lie_where_the_logits_lay_and_a_second_backward_is_refused():
    logits, targets = inputs(torch.float32)
    result = logits * 1
    loss = cross_entropy(result, targets).sum()
    [gradient] = torch.autograd.grad(loss, result, retain_graph=True)
    assert gradient.data_ptr() == result.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_logits_stay():
    logits, targets = inputs(torch.float32)
    with torch.no_grad():
        cross_entropy(logits, targets)
    assert torch.equal(logits, inputs(torch.float32)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_targets_below_zero_do_not_count(dtype):
    logits, targets = inputs(dtype)
    masked = targets.clone()
    masked[1::2] = torch.tensor([-1, -100])
    plain, ours = loss_and_gradient(cross_entropy, logits, targets), loss_and_gradient(cross_entropy, logits, masked)
    for all_of_them, those in zip(plain, ours):
        assert torch.equal(those[::2], all_of_them[::2])
        assert all_of_them[1::2].count_nonzero() and those[1::2].count_nonzero() == 0


def loss_and_gradients_of_labels(labels, *overrides):
    """Of the last stage's loss, by streams and weights, with the streams; and its `loss_and_hits`. One process."""
    from pipehc.megatron.trainer.groups import build_groups
    from pipehc.megatron.trainer.model import build_stage, initialise

    config = tiny_config("train.micro_batch=2", *overrides)
    model = build_stage(config, build_groups(1, 1, 1, False), range(3, 4), first=False, last=True)
    initialise(model, 1, 0.3)
    hidden = torch.randn(11, 2, 3 * 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        both = model.loss_and_hits(hidden, labels)
    loss = model.loss(hidden, labels)
    loss.backward()
    return hidden, model, loss, both


@pytest.mark.parametrize("fused", ["true", "false"])
def test_the_stage_sums_over_labels_that_count(fused):
    """Against PyTorch's cross entropy in fp64."""

    def fn(rank):
        labels = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(1))
        labels[0, :7], labels[1, 4:] = -1, -7
        hidden, model, loss, both = loss_and_gradients_of_labels(labels, f"runtime.fused={fused}")
        output = model.output_layer.weight.detach().double().requires_grad_()
        x = hidden.detach().double().requires_grad_()
        normed = torch.nn.functional.rms_norm(x.unflatten(-1, (3, 32)).mean(-2), (32,), eps=1e-20)  # its weight begins as ones
        logits = (normed @ output.T).transpose(0, 1)
        counted = torch.where(labels < 0, -100, labels)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), counted.flatten(), reduction="sum", ignore_index=-100)
        expected.backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(hidden.grad.double(), x.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model.output_layer.weight.grad.double(), output.grad, rtol=1e-4, atol=1e-6)
        gradient = hidden.grad.transpose(0, 1)
        assert gradient[labels < 0].count_nonzero() == 0 and (gradient[labels >= 0].abs().amax(-1) > 0).all()

        hit = logits.argmax(-1)
        assert both.tolist() == [float(loss), 0.0]
        labels[:, ::2] = torch.where(labels[:, ::2] < 0, labels[:, ::2], hit[:, ::2])  # every other one of those that count
        with torch.no_grad():
            assert model.loss_and_hits(hidden, labels)[1] == (labels[:, ::2] >= 0).sum() == 4

    run_ranks(fn, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_the_vocabulary_equal_the_whole(dtype, ranks):
    """Losses, gradients and the likeliest token; some labels do not count, and one logit is far above all others."""
    logits, targets = inputs(dtype, shape=(5, 2, 12))
    with torch.no_grad():
        logits[1, 1, 7] = 500.0
    targets[0, 1] = targets[3, 0] = -100

    def fn(rank):
        group = torch.distributed.group.WORLD
        own = logits.detach().chunk(ranks, -1)[rank].clone().requires_grad_()
        assert torch.equal(likeliest(own, group), logits.argmax(-1))
        return loss_and_gradient(partial(cross_entropy, group=group), own, targets)

    losses, gradient = loss_and_gradient(cross_entropy, logits, targets)
    found = run_ranks(fn, ranks)
    rounding = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-5}
    for same, _ in found:
        torch.testing.assert_close(same, losses, **rounding)
        assert same[0, 1] == same[3, 0] == 0
    torch.testing.assert_close(torch.cat([part for _, part in found], -1), gradient, **rounding)
