# mypy: disable-error-code="assignment,misc"
"""Second sweep of the backward: the whole gradient of the streams that the coefficients were computed from."""

from pipehc.kernels.language import tl, triton
from pipehc.kernels.projection import columns_of, in_own_layout, load_weights
from pipehc.kernels.tiles import at_token, store_rounded


@triton.jit
def store_stream_gradient(
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
    d_x,
    d_f_before,
    token,
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
    """d_x_j = phi_j d_product - shrink_j x_j + H_pre_j d_y + H_res^T d_x' + what reached x by itself; of these only the terms whose
    inputs are not None. And d_f_before = H_post_before . d_x if asked for."""
    K: tl.constexpr = n * n + 2 * n
    GROUPS: tl.constexpr = n if PER_STREAM else 1
    x, d_x = at_token(x, token, n * C), at_token(d_x, token, n * C)
    if d_y is not None:
        d_y, h_pre = at_token(d_y, token, C), at_token(h_pre, token, n)
    if d_x_next is not None:
        d_x_next, h_res = at_token(d_x_next, token, n * C), at_token(h_res, token, n * n)
    if d_x_direct is not None:
        d_x_direct = at_token(d_x_direct, token, n * C)
    if h_post_before is not None:
        h_post_before, d_f_before = at_token(h_post_before, token, n), at_token(d_f_before, token, C)
    d_product, shrinks = at_token(d_product, token, K), at_token(shrinks, token, GROUPS)
    t = tl.arange(0, BT)[:, None]
    tokens = t < T - token
    entry, valid = columns_of(0, n, PADDED, PER_STREAM)
    whole = tl.load(d_product + t * K + entry, mask=tokens & valid, other=0.0)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        at = c[None, :]
        inside = tokens & (at < C)
        grad_f = tl.zeros([BT, BC], tl.float32)
        if PER_STREAM:
            weights = load_weights(phi, c, 0, C, n, PADDED, PER_STREAM)
        # A loop at run time, with a bound that the compiler cannot see through (C > 0): unrolled, the products of all streams would
        # be in flight, in more registers than there are. For the same reason d_x' and d_y are read again for every j, from L1.
        for j in tl.range(n + tl.minimum(C, 0), num_stages=1):
            if not PER_STREAM:
                weights = load_weights(phi, c, j, C, n, PADDED, PER_STREAM)
            else:
                whole = tl.load(d_product + t * K + entry + j, mask=tokens & valid, other=0.0)
            out = in_own_layout(tl.dot(whole, tl.trans(weights), input_precision=PRECISION), FENCE)
            shrink = tl.load(shrinks + t * GROUPS + j % GROUPS, mask=tokens, other=0.0)
            out -= shrink * tl.load(x + t * (n * C) + j * C + at, mask=inside, other=0.0).to(tl.float32)
            if d_y is not None:
                grad_y = tl.load(d_y + t * C + at, mask=inside, other=0.0).to(tl.float32)
                out += tl.load(h_pre + t * n + j, mask=tokens, other=0.0) * grad_y
            if d_x_next is not None:
                for i in tl.static_range(n):
                    grad = tl.load(d_x_next + t * (n * C) + i * C + at, mask=inside, other=0.0).to(tl.float32)
                    out += tl.load(h_res + t * (n * n) + i * n + j, mask=tokens, other=0.0) * grad
            if d_x_direct is not None:
                out += tl.load(d_x_direct + t * (n * C) + j * C + at, mask=inside, other=0.0).to(tl.float32)
            store_rounded(d_x + t * (n * C) + j * C + at, out, inside)
            if h_post_before is not None:
                grad_f += tl.load(h_post_before + t * n + j, mask=tokens, other=0.0) * out
        if h_post_before is not None:
            store_rounded(d_f_before + t * C + at, grad_f, inside)
