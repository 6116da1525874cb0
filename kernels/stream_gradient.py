# mypy: disable-error-code="assignment,misc"
"""The gradient of the streams, once those of the coefficients are known; programs share out tokens and channels."""

from pipehc.kernels.language import tl, triton
from pipehc.kernels.projection import columns_of, in_own_layout, load_weights
from pipehc.kernels.tiles import aggregate, at_token, load_columns, load_tiles, store_rounded, widened


@triton.jit(do_not_specialize=["T"])
def stream_gradient_kernel(
    x,
    d_y,
    d_x_next,
    d_x_direct,
    h_pre,
    h_res,
    h_post_before,
    phi,
    d_product,
    shrinks,
    norm_weight,
    norms,
    pulls,
    d_x,
    d_f_before,
    weight_shares,
    T,
    C,
    n: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PER_STREAM: tl.constexpr,
    PRECISION: tl.constexpr,
    FENCE: tl.constexpr,
):
    """d_x_j = phi_j d_product - shrink_j x_j + H_pre_j d_y + H_res^T d_x' + what reached x by itself (d_x_direct); of these only
    the terms whose inputs are not None. And d_f_before = H_post_before . d_x if asked for.

    With norm_weight the d_y given is the gradient of the normed y (channel_sums.py); the weight's own gradient is summed over the
    program's tokens, to `weight_shares` [blocks of tokens, C]. The last channels first: those are what the launch before, of which
    the programs of thousands of tokens run at a time, has left in L2."""
    K: tl.constexpr = n * n + 2 * n
    GROUPS: tl.constexpr = n if PER_STREAM else 1
    blocks = tl.cdiv(T, BT)
    pair = tl.program_id(0) // 2  # of tiles, which share lines of memory
    block = blocks - 1 - pair % blocks
    token = block * BT
    tile = 2 * (tl.num_programs(0) // (2 * blocks) - 1 - pair // blocks) + tl.program_id(0) % 2
    c = tile * BC + tl.arange(0, BC)
    at = c[None, :]
    t = tl.arange(0, BT)[:, None]
    tokens = t < T - token
    inside = tokens & (at < C)
    place = t * (n * C) + at
    streams = load_tiles(at_token(x, token, n * C), t, at, C, inside, n)
    if d_y is not None:
        h_pre = at_token(h_pre, token, n)
        dead = tl.load(at_token(d_y, token, C) + t * C + at, mask=inside, other=0.0, eviction_policy="evict_first")
        grad_y = dead.to(tl.float32)
    if d_x_next is not None:
        grads = load_tiles(at_token(d_x_next, token, n * C), t, at, C, inside, n, DEAD=True)
        h_res = at_token(h_res, token, n * n)
    if d_x_direct is not None:
        d_x_direct = at_token(d_x_direct, token, n * C)
    if norm_weight is not None:
        scale = tl.load(at_token(norms, token, n + 1) + t * (n + 1), mask=tokens, other=0.0)
        normed = scale * aggregate(streams, load_columns(h_pre, t, tokens, n), n)
        tl.store(weight_shares + block.to(tl.int64) * C + c, tl.sum(grad_y * normed, 0), mask=c < C)
        grad_y *= tl.load(norm_weight + at, mask=inside, other=0.0).to(tl.float32)
        grad_y = scale * (grad_y - tl.load(at_token(pulls, token, 1) + t, mask=tokens, other=0.0) * normed)
    if h_post_before is not None:
        grad_f = tl.zeros([BT, BC], tl.float32)
        h_post_before = at_token(h_post_before, token, n)
    d_product, shrinks, d_x = at_token(d_product, token, K), at_token(shrinks, token, GROUPS), at_token(d_x, token, n * C)
    for j in tl.static_range(n):
        entry, valid = columns_of(j, n, PADDED, PER_STREAM)
        whole = tl.load(d_product + t * K + entry, mask=tokens & valid, other=0.0)
        weights = load_weights(phi, c, j, C, n, PADDED, PER_STREAM)
        out = in_own_layout(tl.dot(whole, tl.trans(weights), input_precision=PRECISION), FENCE)
        out -= tl.load(shrinks + t * GROUPS + j % GROUPS, mask=tokens, other=0.0) * widened(streams[j], FENCE)
        if d_y is not None:
            out += tl.load(h_pre + t * n + j, mask=tokens, other=0.0) * grad_y
        if d_x_next is not None:
            for i in tl.static_range(n):
                out += tl.load(h_res + t * (n * n) + i * n + j, mask=tokens, other=0.0) * widened(grads[i], FENCE)
        if d_x_direct is not None:
            out += tl.load(d_x_direct + j * C + place, mask=inside, other=0.0).to(tl.float32)
        store_rounded(d_x + j * C + place, out, inside, DEAD=True)
        if h_post_before is not None:
            grad_f += tl.load(h_post_before + t * n + j, mask=tokens, other=0.0) * out
    if h_post_before is not None:
        store_rounded(at_token(d_f_before, token, C) + t * C + at, grad_f, inside)
