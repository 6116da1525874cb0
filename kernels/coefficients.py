"""Mapping coefficients of one sub-layer: H_pre, H_post and H_res from the streams (paper eq. 14 to 19)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from pipehc.kernels.backend import backend_of
from pipehc.kernels.differentiation import matmul
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.mapping import Mapping
from pipehc.kernels.shapes import check_others, check_shape, check_streams, coefficient_dtype

MAPS = ("pre", "post", "res")


def coefficients(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, manifold: Manifold, fixed: Collection[str] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre [T, n], H_post [T, n] and H_res [T, n, n] of streams x [T, n, C].

    phi [n*C, n*n + 2n] ([C, n + 2] for manifolds that project every stream on its own), alpha [3], bias [n*n + 2n]. Columns of phi
    and entries of bias: pre (n), post (n), res (n*n, row-major). x is fp32, bf16 or fp16 and the results are fp32; with everything
    in fp64 they are fp64. Maps named in `fixed` are switched off: H_pre = 1/n, H_post = 1, H_res = I (paper, table 1).
    """
    check_coefficients(x, phi, alpha, bias, manifold, fixed)
    if manifold.static or backend_of(x, x.shape[1]) == "reference":
        return coefficients_reference(x, phi, alpha, bias, manifold, fixed)
    _, _, h_pre, h_post, h_res = Mapping.run(x, None, (phi, alpha, bias), manifold, fixed, with_y=False)
    return h_pre, h_post, h_res


def check_coefficients(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, manifold: Manifold, fixed: Collection[str]) -> None:
    """ValueError unless shapes, dtypes and devices fit each other, `manifold` is one and `fixed` names maps."""
    check_manifold(manifold)
    _, n, channels = check_streams(x)
    parameters = {"bias": bias} if manifold.static else {"phi": phi, "alpha": alpha, "bias": bias}
    shapes = {"phi": manifold.phi_shape(n, channels), "alpha": (3,), "bias": (n * n + 2 * n,)}
    for name, value in parameters.items():
        check_shape(value, shapes[name], name)
    check_others(x, manifold.scalar, **parameters)
    check_fixed(fixed)


def check_manifold(manifold: Manifold) -> None:
    """ValueError, naming what there is, unless it is an instance of a manifold."""
    if not isinstance(manifold, Manifold):
        names = ", ".join(sorted(kind.__name__ for kind in Manifold.__subclasses__()))
        raise ValueError(f"manifold={manifold!r}: must be an instance, as Birkhoff() is, of {names} of pipehc.kernels.manifolds")


def check_fixed(fixed: Collection[str]) -> None:
    """ValueError unless these are names of maps. A string is none, nor is an iterator, which could be read only once."""
    if isinstance(fixed, str) or not isinstance(fixed, Collection):
        raise ValueError(f"fixed={fixed!r}: must be a collection of names among {', '.join(MAPS)}, as in ('pre',)")
    unknown = [name for name in fixed if name not in MAPS]
    if unknown:
        raise ValueError(f"fixed contains {unknown[0]!r}: must be among {', '.join(MAPS)}")


def coefficients_reference(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, manifold: Manifold, fixed: Collection[str] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch: what the kernels are tested against."""
    tokens, n, _ = x.shape
    dtype = coefficient_dtype(x)
    bias = bias.to(dtype)
    if manifold.static:
        logits = bias.expand(tokens, -1)
    else:
        logits = _logits(x.to(dtype), phi.to(dtype), alpha.to(dtype), bias, manifold)
    pre, post, res = logits[:, :n], logits[:, n : 2 * n], logits[:, 2 * n :].unflatten(-1, (n, n))
    if manifold.static:
        h_pre, h_post = torch.softmax(pre, -1), torch.softmax(post, -1)
    elif manifold.per_stream:
        h_pre, h_post = pre, post
    else:
        h_pre, h_post = torch.sigmoid(pre), 2.0 * torch.sigmoid(post)
    if "pre" in fixed:
        h_pre = logits.new_full((tokens, n), 1.0 / n)
    if "post" in fixed:
        h_post = logits.new_ones(tokens, n)
    h_res = torch.eye(n, dtype=dtype, device=x.device).repeat(tokens, 1, 1) if "res" in fixed else manifold.map(res)
    return h_pre, h_post, h_res


def _logits(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, manifold: Manifold) -> Tensor:
    """[T, n*n + 2n]. Dividing by the norm comes after the product, which reads x once (paper, section 4.3.1)."""
    n = x.shape[1]
    if manifold.per_stream:
        # [T, n + 2, n]: entry (row of the map, stream) is column row * n + stream.
        product = matmul(x.flatten(0, 1), phi).unflatten(0, (-1, n)).mT.flatten(1)
        inverse_rms = torch.rsqrt(x.square().mean(-1) + manifold.norm_eps).repeat(1, n + 2)
        product = torch.tanh(product * inverse_rms)
    else:
        flat = x.flatten(1)
        product = matmul(flat, phi) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + manifold.norm_eps)
    counts = torch.tensor([n, n, n * n], device=alpha.device)
    return torch.addcmul(bias, product, alpha.repeat_interleave(counts, output_size=n * n + 2 * n))
