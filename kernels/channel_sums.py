# mypy: disable-error-code="assignment,misc"
"""First sweep of the backward: the sums over channels that the gradients of H_pre, H_post and H_res are made of."""

from pipehc.kernels.language import tl, triton
from pipehc.kernels.tiles import fold, load_tiles, row_sums, zeros


@triton.jit
def store_channel_sums(
    x,
    d_y,
    d_x_next,
    f,
    out,
    rows,
    here,
    C,
    n: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """To `out` [T, K], in the order of a token's K numbers: d_y . x_j, d_x'_i . f and d_x'_i . x_j, those whose inputs are not None."""
    t = rows[:, None]
    tokens = here[:, None]
    K: tl.constexpr = n * n + 2 * n
    res_sums = zeros(n * n if f is not None else 0, BT, BC // 8)
    post_sums = zeros(n if f is not None else 0, BT, BC // 8)
    pre_sums = zeros(n if d_y is not None else 0, BT, BC // 8)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)[None, :]
        inside = tokens & (c < C)
        streams = load_tiles(x, t, c, C, inside, n)
        if f is not None:
            branch = tl.load(f + t * C + c, mask=inside, other=0.0).to(tl.float32)
            new_res, new_post = (), ()
            for i in tl.static_range(n):
                grad = tl.load(d_x_next + t * (n * C) + i * C + c, mask=inside, other=0.0).to(tl.float32)
                new_post += (post_sums[i] + fold(grad * branch),)
                for j in tl.static_range(n):
                    new_res += (res_sums[i * n + j] + fold(grad * streams[j]),)
            res_sums = new_res
            post_sums = new_post
        if d_y is not None:
            grad_y = tl.load(d_y + t * C + c, mask=inside, other=0.0).to(tl.float32)
            new_pre = ()
            for j in tl.static_range(n):
                new_pre += (pre_sums[j] + fold(grad_y * streams[j]),)
            pre_sums = new_pre
    k = tl.arange(0, PADDED)[None, :]
    sums = pre_sums if d_y is not None else zeros(n, BT, BC // 8)
    if f is not None:
        sums += post_sums + res_sums
    tl.store(out + t * K + k, row_sums(sums, K if f is not None else n, PADDED), mask=tokens & (k < K))
