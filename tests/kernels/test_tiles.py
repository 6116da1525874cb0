"""Tensors of more than 2^31 elements: only the last program of a launch runs, on memory of which only the end is touched."""

import pytest
import torch
from kernel_cases import make_inputs
from triton.runtime import interpreter

from pipehc.kernels import backward
from pipehc.kernels.backward import Incoming, launch_mapping_backward
from pipehc.kernels.forward import launch_mapping
from pipehc.kernels.manifolds import Birkhoff
from pipehc.kernels.post_res import launch_post_res, launch_post_res_backward
from pipehc.kernels.pre import launch_pre, launch_pre_backward

N, C = 2, 64
TOKENS = 2**31 // (N * C) + 64 * 3 + 5
TAIL = TOKENS % 64
"""Tokens of the last program of whatever power of two up to 64, except two."""


class Nothing:
    def __getitem__(self, grid):
        return lambda *arguments, **named: None


FIRST = {"map_kernel": -(-TAIL // 2), "stream_gradient_kernel": 2}
"""Programs of the last tokens, where they are not the last program: two tokens each; a pair of tiles of channels."""


@pytest.fixture
def last_programs(monkeypatch):
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    call, whole, begin = executor.__call__, (), 0

    def call_last(run, *arguments, **named):
        nonlocal whole, begin
        whole, count = (*run.grid, 1, 1)[:3], FIRST.get(run.fn.__name__, 1)
        begin = 0 if run.fn.__name__ in FIRST else whole[0] - 1
        run.grid = (count, *run.grid[1:])
        return call(run, *arguments, **named)

    monkeypatch.setattr(executor, "__call__", call_last)
    monkeypatch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", whole))
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (x + begin, y, z)))
    # Their programs go over all tokens.
    for name in ("phi_gradient_kernel", "parameter_sum_kernel"):
        monkeypatch.setattr(backward, name, Nothing())


def ending_in(tail):
    """A tensor for TOKENS tokens that ends in these; the rest is never written, so that it takes address space alone."""
    whole = torch.empty(TOKENS, *tail.shape[1:], dtype=tail.dtype)
    whole[-len(tail) :] = tail
    return whole


def check(operation, tails):
    small = operation(*tails)
    large = operation(*(ending_in(t) for t in tails))
    for want, got in zip(small, large):
        assert len(got) == TOKENS and torch.equal(got[-TAIL:], want), "the last tokens differ"


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the last program alone, as only the interpreter can")
def test_more_than_two_to_the_31_elements(last_programs):
    x, f, h_post, h_res, parameters = make_inputs(TAIL, N, C, torch.bfloat16)
    d_y, d_x = f.flip(0).contiguous(), x.flip(0).contiguous()
    assert TOKENS * N * C > 2**31
    check(lambda *t: (launch_pre(*t),), (x, h_post))
    check(launch_pre_backward, (x, h_post, d_y))
    check(lambda *t: (launch_post_res(*t),), (x, f, h_post, h_res))
    check(launch_post_res_backward, (d_x, x, f, h_post, h_res))
    check(lambda x, *p: tuple(launch_mapping(x, p, parameters, Birkhoff(2), (), True).values()), (x, f, h_post, h_res))
    saved = launch_mapping(x, None, parameters, Birkhoff(2), (), True)

    def mapping_backward(x, f, d_x, d_y, h_post, *values):
        incoming, before = Incoming(d_y, d_x, None, None, None, (d_x, f)), (h_post, f.dtype)
        got = launch_mapping_backward(x, dict(zip(saved, values)), parameters, incoming, before, Birkhoff(2), ())
        return got.x, got.f_before

    check(mapping_backward, (x, f, d_x, d_y, h_post, *saved.values()))
