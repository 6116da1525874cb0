"""F_post,res: the streams after a sub-layer, x' = H_res x + H_post^T f."""

from __future__ import annotations

import torch
from torch import Tensor

from pipehc.kernels.shapes import check_shape, check_streams, coefficient_dtype


def post_res(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x' [T, n, C] in the dtype of x, from streams x [T, n, C], the sub-layer's output f [T, C], h_post [T, n] and h_res [T, n, n].

    Stream i of the result is the sum over j of h_res[i, j] x[j], plus h_post[i] f, summed in fp32.
    """
    check_post_res(x, f, h_post, h_res)
    return post_res_reference(x, f, h_post, h_res)


def check_post_res(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor) -> None:
    """ValueError unless the shapes fit each other."""
    tokens, n, channels = check_streams(x)
    check_shape(f, (tokens, channels), "f")
    check_shape(h_post, (tokens, n), "h_post")
    check_shape(h_res, (tokens, n, n), "h_res")


def post_res_reference(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    dtype = coefficient_dtype(x, f, h_post, h_res)
    mixed = torch.bmm(h_res.to(dtype), x.to(dtype))
    return torch.addcmul(mixed, h_post.to(dtype).unsqueeze(-1), f.to(dtype).unsqueeze(1)).to(x.dtype)
