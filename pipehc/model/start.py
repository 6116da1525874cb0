"""Where the maps of a hyper-connection start: which stream a sub-layer reads, and which it writes (`residual.init`).

Streams start as copies of the embedding. Where all sub-layers read and write all streams alike, they stay copies: their gradients
are equal too, H_res mixes equals, and only the little that alpha lets through tells them apart. A start that reads one stream more
than the others still computes what the plain residual computes, as long as its shares sum to one and all streams are written alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Init = Literal["even", "staggered", "onehot", "scattered"]
INITS: Sequence[str] = get_args(Init)

SHARES: dict[str, float] = {"even": 0.0, "staggered": 0.95, "onehot": 1.0, "scattered": 0.95}
"""Of the stream that a sub-layer reads most, number sub-layer mod n; the others have equal parts of the rest. 0: all equal.
With 1 this is where HC starts (arXiv:2409.19606)."""

NEARLY_ONE = 0.999
"""The largest share where a sigmoid makes it."""

WRITE_STD = 0.5
"""scattered: standard deviation of the logits of H_post, which is 2 sigmoid of them."""


def reads(init: str, sublayer: int, n: int) -> Tensor:
    """H_pre [n] in fp64, with alpha = 0. It sums to one."""
    if init not in SHARES:
        raise ValueError(f"init={init!r}: must be one of {', '.join(INITS)}")
    most = SHARES[init]
    if n == 1 or not most:
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    shares = torch.full((n,), (1 - most) / (n - 1), dtype=torch.float64)
    shares[sublayer % n] = most
    return shares


def read_logits(init: str, sublayer: int, n: int) -> Tensor:
    """Those of which the sigmoid is `reads`, [n] fp64; finite."""
    if n > 1 and SHARES.get(init) == 1.0:
        shares = torch.full((n,), (1 - NEARLY_ONE) / (n - 1), dtype=torch.float64)
        shares[sublayer % n] = NEARLY_ONE
    else:
        shares = reads(init, sublayer, n)
    return torch.logit(shares, eps=1e-9)


def write_logits(init: str, n: int, generator: torch.Generator | None) -> Tensor:
    """Logits of H_post = 2 sigmoid of them, [n] fp64."""
    if init != "scattered":
        return torch.zeros(n, dtype=torch.float64)
    device = "cpu" if generator is None else generator.device
    return WRITE_STD * torch.randn(n, generator=generator, device=device, dtype=torch.float64).cpu()
