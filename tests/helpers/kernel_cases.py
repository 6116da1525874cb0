"""Running one operation through both backends and comparing results and every gradient with the fp64 reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipehc.kernels import manifolds
from pipehc.kernels.language import tl, triton
from pipehc.kernels.matrices import load_matrix, store_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU the kernels run in Triton's interpreter."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Largest relative error (Euclidean norm over a whole tensor) against the fp64 reference, by dtype of the streams."""


@contextmanager
def backend(name: str):
    before = os.environ.get("PIPEHC_KERNELS")
    os.environ["PIPEHC_KERNELS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["PIPEHC_KERNELS"]
        else:
            os.environ["PIPEHC_KERNELS"] = before


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    if not got.numel():
        return 0.0
    error, size = float((got.double() - want.double()).norm()), float(want.double().norm())
    return error / size if size else float("inf") if error else 0.0


def evaluate(name: str, operation: Callable[..., Any], inputs: Sequence[Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Outputs, and gradients of a random linear form of all outputs, named out0.. and grad0.. in order."""
    with backend(name):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        outputs = operation(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(o.shape, generator=generator).to(o.device) for o in outputs]
        # A map that is switched off is a constant of the reference.
        pairs = [(o, d.to(o.dtype)) for o, d in zip(outputs, directions) if o.requires_grad]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [d for _, d in pairs])
    result = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    result.update({f"grad{i}": t.grad if t.grad is not None else torch.zeros_like(t) for i, t in enumerate(leaves)})
    return result


def compare(operation: Callable[..., Any], inputs: Sequence[Tensor], tolerance: float) -> dict[str, Tensor]:
    """Asserts that Triton agrees with the reference in fp64 on the same (already rounded) inputs; returns Triton's results."""
    inputs = [t.to(DEVICE) for t in inputs]
    got = evaluate("triton", operation, inputs)
    want = evaluate("reference", operation, [t.double() for t in inputs])
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert all(e <= tolerance for e in errors.values()), errors
    return got


def make_inputs(
    tokens: int, n: int, channels: int, dtype: torch.dtype, per_stream: bool = False, seed: int = 0, parameters: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """x, f, h_post, h_res and [phi, alpha, bias, ...]; logits of order 1, so that every nonlinearity is in play."""
    g = torch.Generator().manual_seed(seed)
    columns = n * n + 2 * n
    x = torch.randn(tokens, n, channels, generator=g).to(dtype)
    f = torch.randn(tokens, channels, generator=g).to(dtype)
    h_post, h_res = torch.rand(tokens, n, generator=g) * 2, torch.randn(tokens, n, n, generator=g)
    rows, width = (channels, n + 2) if per_stream else (n * channels, columns)
    parts = []
    for _ in range(parameters):
        parts += [
            torch.randn(rows, width, generator=g) / rows**0.5,
            torch.tensor([0.8, 0.6, 1.1]),
            torch.randn(columns, generator=g) + torch.cat([torch.zeros(2 * n), 2 * torch.eye(n).flatten()]),
        ]
    return x, f, h_post, h_res, parts


ADVERSARIAL = ("huge", "tiny", "constant", "zero", "one_hot")


def adversarial(kind: str, x: Tensor, f: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Streams that are huge, tiny, zero or equal in all channels, or logits of H_res that are a permutation of +-50."""
    n = x.shape[1]
    phi, alpha, bias = parameters
    if kind == "huge":
        x, f = x * 1e15, f * 1e15
    elif kind == "tiny":
        x, f = x * 1e-12, f * 1e-12
    elif kind == "constant":
        x = x[:, :, :1].expand_as(x).contiguous()
        x[0] = 3.0
    elif kind == "zero":
        # Only zeros: beside their gradient, 1e10 times the others', a relative error would not see the others.
        x = torch.zeros_like(x)
    else:
        one_hot = torch.eye(n).roll(1, 0) * 100 - 50
        bias = torch.cat([bias[: 2 * n], one_hot.flatten()])
        bias[0], bias[n] = 50.0, -50.0
    return x, f, [phi, alpha, bias]


def norm_weight(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of an RMSNorm, [C]: around 1."""
    return (1 + 0.3 * torch.randn(channels, generator=torch.Generator().manual_seed(3))).to(dtype)


def all_manifolds(device: str = DEVICE) -> dict[str, manifolds.Manifold]:
    """One of each, with scalars that make every part count; they are on `device`, as the streams must be."""
    return {
        "birkhoff": manifolds.Birkhoff(iterations=6),
        "isometric": manifolds.Isometric(condition=100.0),
        "hybrid": manifolds.Hybrid(
            torch.tensor(0.3, device=device), manifolds.Birkhoff(iterations=3), manifolds.Isometric(condition=10.0)
        ),
        "identity_offset": manifolds.IdentityOffset(),
        "harmonized": manifolds.Harmonized(torch.tensor(0.6, device=device)),
    }


@triton.jit
def map_kernel(
    z,
    grad,
    scalar,
    out,
    d_z,
    d_scalar,
    T,
    n: tl.constexpr,
    BT: tl.constexpr,
    MAP: tl.constexpr,
    BACKWARD: tl.constexpr,
    SETTINGS: tl.constexpr,
):
    N: tl.constexpr = triton.next_power_of_2(n)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    here = rows < T
    logits = load_matrix(z, rows, here, n * n, n, N)
    number = None
    if scalar is not None:
        number = tl.load(scalar)
    back, by_number = BACKWARD(logits, load_matrix(grad, rows, here, n * n, n, N), number, n, SETTINGS)
    store_matrix(out, MAP(logits, number, n, SETTINGS), rows, here, n * n, n, N)
    store_matrix(d_z, back, rows, here, n * n, n, N)
    tl.store(d_scalar + rows, by_number, mask=here)


def run_map(manifold: manifolds.Manifold, logits: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A manifold's Triton functions alone, on logits [T, n, n] fp32: (H_res, gradient by logits, gradient by the scalar [T])."""
    logits, grad = logits.to(DEVICE), grad.to(DEVICE)
    out, d_z, d_scalar = torch.empty_like(logits), torch.empty_like(logits), logits.new_empty(len(logits))
    forward, backward = manifold.device_functions
    scalar = None if manifold.scalar is None else manifold.scalar.detach()
    grid = (triton.cdiv(len(logits), 64),)
    n = logits.shape[-1]
    map_kernel[grid](logits, grad, scalar, out, d_z, d_scalar, len(logits), n, 64, forward, backward, manifold.settings)
    return out, d_z, d_scalar


def check_map(manifold: manifolds.Manifold, logits: Tensor, forward_tolerance: float, backward_tolerance: float) -> Tensor:
    """Asserts that the Triton functions agree with `map` in fp64, per matrix for H_res; returns the H_res of Triton."""
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    out, d_z, d_scalar = run_map(manifold, logits, grad)
    exact = logits.double().to(DEVICE).requires_grad_()
    want = manifold.map(exact)
    want.backward(grad.double().to(DEVICE))
    assert exact.grad is not None
    assert torch.isfinite(out).all() and torch.isfinite(d_z).all() and torch.isfinite(d_scalar).all()
    assert float((out - want).detach().abs().max()) <= forward_tolerance
    assert relative_error(d_z, exact.grad) <= backward_tolerance
    return out
