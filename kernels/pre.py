"""F_pre: the input of a sub-layer from the streams, y = H_pre x."""

from __future__ import annotations

import torch
from torch import Tensor

from pipehc.kernels.shapes import check_shape, check_streams, coefficient_dtype


def pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """y [T, C] in the dtype of x: the sum of streams x [T, n, C] with weights h_pre [T, n], summed in fp32."""
    tokens, n, _ = check_streams(x)
    check_shape(h_pre, (tokens, n), "h_pre")
    return pre_reference(x, h_pre)


def pre_reference(x: Tensor, h_pre: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    dtype = coefficient_dtype(x, h_pre)
    return torch.bmm(h_pre.to(dtype).unsqueeze(1), x.to(dtype)).squeeze(1).to(x.dtype)
