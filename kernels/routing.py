# mypy: disable-error-code="assignment,misc,operator"
"""Experts for tokens: which, in what rows their tokens lie sorted by expert, the copies there, and the sums of what comes back.

Rows of one token are summed in the order of their experts, in fp32: results do not depend on the order of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.backend import backend_of
from pipehc.kernels.differentiation import once
from pipehc.kernels.language import launch, launches, tl, triton
from pipehc.kernels.tiles import store_rounded

EPSILON = 1e-20  # Megatron's


def choose(logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For every token the k experts of largest sigmoid(logit) + bias: probs [T, k], their sigmoids divided by the sum of these, in
    the order of the experts; and the map [T, E], bool, of who was chosen. logits [T, E] and bias [E], fp32."""
    if backend_of(logits.unsqueeze(1), 1) == "triton":
        probs, chosen = _Choose.apply(logits, bias, k)
        return probs, chosen
    scores = torch.sigmoid(logits)
    top = torch.topk(scores + bias, k, dim=1).indices
    scores = scores.gather(1, top)
    probs = scores / (scores.sum(-1, keepdim=True) + EPSILON) if k > 1 else scores
    return probs.gather(1, top.argsort(1)), torch.zeros_like(logits, dtype=torch.bool).scatter(1, top, True)


def place(chosen: Tensor, k: int) -> Tensor:
    """[T, k] int32: the rows of each token, in the order of its experts, where rows are sorted by expert and then by token."""
    before = chosen.cumsum(0, dtype=torch.int32)
    if backend_of(chosen.unsqueeze(1), 1) == "triton":
        return launch_place(chosen, before, k)
    experts = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :k]
    return (before + (before[-1:].cumsum(1, dtype=torch.int32) - before[-1:] - 1)).gather(1, experts)


def spread(x: Tensor, probs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, C] and probs [T, k] -> [T k, C] and [T k]: every token and probability in its `rows`."""
    out, of_probs = _Spread.apply(x, probs, rows)
    return out, of_probs


def collect(y: Tensor, rows: Tensor, more: Tensor | None = None) -> Tensor:
    """y [T k, C] -> [T, C]: the sum of a token's rows, and of `more` [T, C]."""
    out: Tensor = _Collect.apply(y, rows, more)
    return out


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        probs, chosen = launch_choose(logits.contiguous(), bias, k)
        ctx.save_for_backward(logits, chosen)
        ctx.k = k
        ctx.mark_non_differentiable(chosen)
        return probs, chosen

    @staticmethod
    @once
    def backward(ctx: Any, d_probs: Tensor, _: Any) -> tuple[Tensor, None, None]:
        logits, chosen = ctx.saved_tensors
        return launch_choose_backward(logits.contiguous(), chosen, d_probs.contiguous(), ctx.k), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        out, of_probs = _spread(x.contiguous(), rows, probs.contiguous())
        assert of_probs is not None
        return out, of_probs

    @staticmethod
    @once
    def backward(ctx: Any, d_out: Tensor, d_probs: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _collect(d_out.contiguous(), rows, None), d_probs.index_select(0, rows.view(-1)).view(rows.shape), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, more: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.more = more is not None
        return _collect(y.contiguous(), rows, more)

    @staticmethod
    @once
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (rows,) = ctx.saved_tensors
        return _spread(d_out.contiguous(), rows, None)[0], None, d_out if ctx.more else None


def _spread(x: Tensor, rows: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if backend_of(x.unsqueeze(1), 1) == "triton":
        return launch_spread(x, rows, probs)
    tokens, k = rows.shape
    flat = rows.view(-1).long()
    out = x.new_empty(tokens * k, x.shape[1])
    out[flat] = x.unsqueeze(1).expand(-1, k, -1).reshape(out.shape)
    if probs is None:
        return out, None
    of_probs = probs.new_empty(tokens * k)
    of_probs[flat] = probs.reshape(-1)
    return out, of_probs


def _collect(y: Tensor, rows: Tensor, more: Tensor | None) -> Tensor:
    if backend_of(y.unsqueeze(1), 1) == "triton":
        return launch_collect(y, rows, None if more is None else more.contiguous())
    wide = torch.promote_types(y.dtype, torch.float32)
    total = y.index_select(0, rows[:, 0]).to(wide)
    for j in range(1, rows.shape[1]):
        total = total + y.index_select(0, rows[:, j])
    if more is not None:
        total = total + more
    return total.to(y.dtype)


@triton.jit(do_not_specialize=["T"])
def choose_kernel(logits, bias, probs, chosen, T, E, k: tl.constexpr, EPS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    e = tl.arange(0, BE)[None, :]
    inside = (t < T) & (e < E)
    scores = tl.sigmoid(tl.load(logits + t * E + e, mask=inside, other=0.0))
    rest = scores + tl.load(bias + e, mask=e < E, other=0.0)
    # Whatever the numbers are, k different experts are chosen: NaN first, and nothing is as small as what is not to be chosen.
    rest = tl.where(rest == rest, tl.maximum(rest, -3e38), 3e38)
    rest = tl.where(e < E, rest, float("-inf"))
    for _ in tl.static_range(k):
        rest = tl.where(e == tl.argmax(rest, 1, keep_dims=True), float("-inf"), rest)
    taken = (rest == float("-inf")) & (e < E)
    values = tl.where(taken, scores, 0.0)
    if k > 1:
        values = values / (tl.sum(values, 1, keep_dims=True) + EPS)
    tl.store(chosen + t * E + e, taken, mask=inside)
    tl.store(probs + t * k + tl.cumsum(taken.to(tl.int32), 1) - 1, values, mask=inside & taken)


@triton.jit(do_not_specialize=["T"])
def choose_backward_kernel(
    logits, chosen, d_probs, d_logits, T, E, k: tl.constexpr, EPS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    e = tl.arange(0, BE)[None, :]
    inside = (t < T) & (e < E)
    scores = tl.sigmoid(tl.load(logits + t * E + e, mask=inside, other=0.0))
    taken = tl.load(chosen + t * E + e, mask=inside, other=0) != 0
    grad = tl.load(d_probs + t * k + tl.cumsum(taken.to(tl.int32), 1) - 1, mask=inside & taken, other=0.0)
    if k > 1:
        total = tl.sum(tl.where(taken, scores, 0.0), 1, keep_dims=True) + EPS
        grad = (grad - tl.sum(grad * scores, 1, keep_dims=True) / total) / total
    tl.store(d_logits + t * E + e, tl.where(taken, grad * scores * (1.0 - scores), 0.0), mask=inside)


@triton.jit(do_not_specialize=["T"])
def place_kernel(chosen, before, rows, T, E, k: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    e = tl.arange(0, BE)[None, :]
    inside = (t < T) & (e < E)
    taken = tl.load(chosen + t * E + e, mask=inside, other=0) != 0
    totals = tl.load(before + (T - 1).to(tl.int64) * E + e, mask=e < E, other=0)
    row = tl.load(before + t * E + e, mask=inside, other=0) + tl.cumsum(totals, 1) - totals - 1
    tl.store(rows + t * k + tl.cumsum(taken.to(tl.int32), 1) - 1, row, mask=inside & taken)


@triton.jit
def spread_kernel(x, rows, probs, out, of_probs, C, k: tl.constexpr, B: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * B + tl.arange(0, B)
    value = tl.load(x + t * C + c, mask=c < C, other=0.0)
    for j in tl.static_range(k):
        row = tl.load(rows + t * k + j).to(tl.int64)
        tl.store(out + row * C + c, value, mask=c < C)
        if probs is not None:
            tl.store(of_probs + row, tl.load(probs + t * k + j), mask=tl.program_id(1) == 0)


@triton.jit
def collect_kernel(y, rows, more, out, C, k: tl.constexpr, B: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    for j in tl.static_range(k):
        row = tl.load(rows + t * k + j).to(tl.int64)
        total += tl.load(y + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    if more is not None:
        total += tl.load(more + t * C + c, mask=c < C, other=0.0).to(tl.float32)
    store_rounded(out + t * C + c, total, c < C)


def _tiles(tokens: int, experts: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and blocks of what looks at all experts of a token."""
    block = max(16, triton.next_power_of_2(experts))
    rows = max(1, 2048 // block)
    return (triton.cdiv(tokens, rows),), {"BT": rows, "BE": block, "num_warps": 4}


@launches
def launch_choose(logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`choose` in one launch, of contiguous tensors."""
    tokens, experts = logits.shape
    probs, chosen = logits.new_empty(tokens, k), torch.empty_like(logits, dtype=torch.bool)
    if tokens:
        grid, blocks = _tiles(tokens, experts)
        launch(choose_kernel, grid, logits, bias, probs, chosen, tokens, experts, k=k, EPS=EPSILON, **blocks)
    return probs, chosen


@launches
def launch_choose_backward(logits: Tensor, chosen: Tensor, d_probs: Tensor, k: int) -> Tensor:
    """The gradient of the logits in one launch, of contiguous tensors."""
    d_logits = torch.empty_like(logits)
    if logits.shape[0]:
        grid, blocks = _tiles(*logits.shape)
        launch(choose_backward_kernel, grid, logits, chosen, d_probs, d_logits, *logits.shape, k=k, EPS=EPSILON, **blocks)
    return d_logits


@launches
def launch_place(chosen: Tensor, before: Tensor, k: int) -> Tensor:
    """`place` in one launch. before: how many of the tokens up to each, itself included, go to each expert, int32."""
    rows = before.new_empty(chosen.shape[0], k)
    if chosen.shape[0]:
        grid, blocks = _tiles(*chosen.shape)
        launch(place_kernel, grid, chosen, before, rows, *chosen.shape, k=k, **blocks)
    return rows


@launches
def launch_spread(x: Tensor, rows: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`spread` in one launch, of contiguous tensors, with or without probs."""
    (tokens, k), channels = rows.shape, x.shape[1]
    out, of_probs = x.new_empty(tokens * k, channels), None if probs is None else probs.new_empty(tokens * k)
    if tokens:
        block = _block(channels)
        grid = (tokens, triton.cdiv(channels, block))
        launch(spread_kernel, grid, x, rows, probs, out, of_probs, channels, k=k, B=block, num_warps=4)
    return out, of_probs


@launches
def launch_collect(y: Tensor, rows: Tensor, more: Tensor | None) -> Tensor:
    """`collect` in one launch, of contiguous tensors."""
    (tokens, k), channels = rows.shape, y.shape[1]
    out = y.new_empty(tokens, channels)
    if tokens:
        block = _block(channels)
        launch(collect_kernel, (tokens, triton.cdiv(channels, block)), y, rows, more, out, channels, k=k, B=block, num_warps=4)
    return out


def _block(channels: int) -> int:
    """Channels at a time: eight for each thread of four warps, fewer in a narrow row."""
    return min(1024, max(16, triton.next_power_of_2(channels)))
