"""Routing: against Megatron's own functions, and kernels against the reference."""

import pytest
import torch
from kernel_cases import DEVICE, backend, relative_error
from megatron.core.transformer.moe.moe_utils import permute, topk_routing_with_score_function, unpermute

from pipehc.kernels.routing import choose, collect, place, spread

CASES = [(1, 1, 1, 3), (7, 4, 2, 20), (19, 72, 6, 5), (12, 5, 5, 16)]  # tokens, experts, k, channels


def inputs(tokens, experts, k, channels, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens)
    logits, bias = torch.randn(tokens, experts, generator=g), 0.1 * torch.randn(experts, generator=g)
    return logits.to(DEVICE), bias.to(DEVICE), torch.randn(tokens, channels, generator=g).to(dtype).to(DEVICE)


def work(tokens, probs):
    """Unlike in every row."""
    factors = torch.linspace(1, 2, len(tokens), device=tokens.device) * probs
    return (tokens * factors.unsqueeze(-1)).to(tokens.dtype)


def megatron(logits, bias, k, x, shared):
    """Routes x to its experts, and back, with what a shared expert says. And all gradients."""
    leaves = [t.clone().requires_grad_() for t in (logits, x, shared)]
    probs, chosen = topk_routing_with_score_function(leaves[0], k, score_function="sigmoid", expert_bias=bias)
    tokens, of_probs, order, _, _ = permute(leaves[1], chosen, probs, num_out_tokens=len(x) * k)
    out = unpermute(work(tokens, of_probs), order, x.shape) + leaves[2]
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype).to(out.device))
    return chosen, tokens.detach(), of_probs.detach(), out.detach(), *(leaf.grad for leaf in leaves)


def own(logits, bias, k, x, shared):
    leaves = [t.clone().requires_grad_() for t in (logits, x, shared)]
    probs, chosen = choose(leaves[0], bias, k)
    rows = place(chosen, k)
    tokens, of_probs = spread(leaves[1], probs, rows)
    out = collect(work(tokens, of_probs), rows, leaves[2])
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype).to(out.device))
    return chosen, tokens.detach(), of_probs.detach(), out.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(("tokens", "experts", "k", "channels"), CASES)
def test_reference_is_megatron_to_the_bit(tokens, experts, k, channels):
    """In fp32, on a CPU, which adds up rows one after the other as we do."""
    logits, bias, x = inputs(tokens, experts, k, channels)
    with backend("reference"):
        for got, want in zip(own(logits, bias, k, x, 3 * x), megatron(logits, bias, k, x, 3 * x)):
            if DEVICE == "cpu":
                assert torch.equal(got, want)
            else:
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "k", "channels"), CASES)
def test_kernels(tokens, experts, k, channels, dtype):
    """Chosen and moved to the bit. Sums of fp32 in another order; of bf16 rounded once, so nearer to fp32 than Megatron's."""
    logits, bias, x = inputs(tokens, experts, k, channels, dtype)
    truth = megatron(logits, bias, k, x.float(), 3 * x.float())
    with backend("triton"):
        found = own(logits, bias, k, x, 3 * x)
    assert torch.equal(found[0], truth[0]) and torch.equal(found[1].float(), truth[1])
    for got, want in zip(found[2:], truth[2:]):
        assert relative_error(got, want) < (2e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), float("-inf")])
def test_whatever_the_numbers_are_rows_are_different_ones_inside(worst):
    """Else a loss that is not finite would show as an address that is not there."""
    logits = torch.full((9, 6), worst, device=DEVICE)
    logits[0, :2] = 1.0
    for bias in (torch.zeros(6, device=DEVICE), torch.full((6,), float("-inf"), device=DEVICE)):
        for name in ("triton", "reference"):
            with backend(name):
                probs, chosen = choose(logits, bias, 4)
                rows = place(chosen, 4)
            assert probs.shape == (9, 4) and sorted(rows.flatten().tolist()) == list(range(36)), (name, worst)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_no_tokens(name):
    logits, x = torch.zeros(0, 4, device=DEVICE, requires_grad=True), torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    with backend(name):
        probs, chosen = choose(logits, torch.zeros(4, device=DEVICE), 2)
        rows = torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)
        tokens, _ = spread(x, probs, rows)
        collect(tokens, rows).sum().backward()
    assert tokens.shape == (0, 8) and chosen.shape == (0, 4) and x.grad.shape == (0, 8)
