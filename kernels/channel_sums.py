# mypy: disable-error-code="assignment,misc"
"""First sweep of the backward: the sums over channels that the gradients of H_pre, H_post and H_res are made of."""

from pipehc.kernels.language import tl, triton
from pipehc.kernels.tiles import at_token, fold, load_tiles, row_sums, zeros


@triton.jit
def store_channel_sums(
    x,
    d_y,
    d_x_next,
    f,
    norm_weight,
    norms,
    h_pre,
    out,
    pulls,
    token,
    T,
    C,
    n: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """To `out` [T, K]: d_y . x_j, d_x'_i . f and d_x'_i . x_j, those whose inputs are not None.

    With norm_weight the d_y given is the gradient of the normed y, z = r y weight. Of g = weight d_y the gradient of y itself is
    r (g - pull r y), where pull = r (g . y) / C; to `pulls` [T]. g . y is a sum of the g . x_j, and r y . x_j is in `norms`
    (forward.py).
    """
    K: tl.constexpr = n * n + 2 * n
    ALL: tl.constexpr = triton.next_power_of_2(K)
    x, out = at_token(x, token, n * C), at_token(out, token, K)
    if f is not None:
        f, d_x_next = at_token(f, token, C), at_token(d_x_next, token, n * C)
    if d_y is not None:
        d_y = at_token(d_y, token, C)
    t = tl.arange(0, BT)[:, None]
    tokens = t < T - token
    res_sums = zeros(n * n if f is not None else 0, BT, BC // 8)
    post_sums = zeros(n if f is not None else 0, BT, BC // 8)
    pre_sums = zeros(n if d_y is not None else 0, BT, BC // 8)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)[None, :]
        inside = tokens & (c < C)
        streams = load_tiles(x, t, c, C, inside, n)
        if f is not None:
            branch = tl.load(f + t * C + c, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            new_res, new_post = (), ()
            for i in tl.static_range(n):
                grad = tl.load(d_x_next + t * (n * C) + i * C + c, mask=inside, other=0.0).to(tl.float32)
                new_post += (post_sums[i] + fold(grad * branch),)
                for j in tl.static_range(n):
                    new_res += (res_sums[i * n + j] + fold(grad * streams[j].to(tl.float32)),)
            res_sums = new_res
            post_sums = new_post
        if d_y is not None:
            grad_y = tl.load(d_y + t * C + c, mask=inside, other=0.0).to(tl.float32)
            if norm_weight is not None:
                grad_y *= tl.load(norm_weight + c, mask=inside, other=0.0).to(tl.float32)
            new_pre = ()
            for j in tl.static_range(n):
                new_pre += (pre_sums[j] + fold(grad_y * streams[j].to(tl.float32)),)
            pre_sums = new_pre
    k = tl.arange(0, ALL)[None, :]
    sums = pre_sums if d_y is not None else zeros(n, BT, BC // 8)
    if f is not None:
        sums += post_sums + res_sums
    tl.store(out + t * K + k, row_sums(sums, K if f is not None else n, ALL), mask=tokens & (k < K))
    if norm_weight is not None:
        tl.debug_barrier()
        norms, h_pre, pulls = at_token(norms, token, n + 1), at_token(h_pre, token, n), at_token(pulls, token, 1)
        j = tl.arange(0, triton.next_power_of_2(n))[None, :]
        of_y = tokens & (j < n)
        found = tl.load(out + t * K + j, mask=of_y, other=0.0)
        scale = tl.load(norms + t * (n + 1), mask=tokens, other=0.0)
        pull = scale / C * tl.sum(tl.load(h_pre + t * n + j, mask=of_y, other=0.0) * found, 1, keep_dims=True)
        found = scale * (found - pull * tl.load(norms + t * (n + 1) + 1 + j, mask=of_y, other=0.0))
        tl.debug_barrier()  # all have read before any writes
        tl.store(out + t * K + j, found, mask=of_y)
        tl.store(pulls + t, pull, mask=tokens)
