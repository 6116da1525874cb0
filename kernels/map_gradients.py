# mypy: disable-error-code="assignment,misc"
"""Backward of the maps: from gradients of H_pre, H_post and H_res to the logits, and on through alpha, tanh and the norm."""

from pipehc.kernels.language import tl, triton
from pipehc.kernels.maps import load_logits, load_part, store_part, tanh
from pipehc.kernels.matrices import load_matrix, load_vector, store_vector
from pipehc.kernels.tiles import at_token


@triton.jit
def map_gradient(sums, direct, token, rows, here, part: tl.constexpr, n: tl.constexpr, N: tl.constexpr):
    """Gradient of a map: the sums over channels, and what reached it by itself, either of them None."""
    BT: tl.constexpr = rows.shape[0]
    if part < 2:
        total = tl.zeros([BT, N], tl.float32)
        if direct is not None:
            total += load_vector(at_token(direct, token, n), rows, here, n, n, N)
    else:
        total = tl.zeros([BT, N, N], tl.float32)
        if direct is not None:
            total += load_matrix(at_token(direct, token, n * n), rows, here, n * n, n, N)
    if sums is not None:
        total += load_part(at_token(sums, token, n * n + 2 * n), rows, here, part, n, N)
    return total


@triton.jit
def map_backward(
    grad,
    product,
    alpha,
    bias,
    number,
    inverse,
    d_logits,
    d_product,
    rows,
    here,
    part: tl.constexpr,
    n: tl.constexpr,
    N: tl.constexpr,
    PER_STREAM: tl.constexpr,
    MAP_BACKWARD: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIXED: tl.constexpr,
):
    """From the gradient of a map to that of its logits and, through alpha and tanh, of the product before division by the norm:
    both are stored. Returns the pull on the norm, [BT, N or 1] like `inverse`, and the gradient by the manifold's scalar, [BT]."""
    logits = load_logits(product, alpha, bias, rows, here, part, n, N, PER_STREAM)
    by_number = tl.zeros([grad.shape[0]], tl.float32)
    if FIXED[part]:
        grad = tl.zeros_like(grad)
    elif part == 2:
        grad, by_number = MAP_BACKWARD(logits, grad, number, n, SETTINGS)
    elif not PER_STREAM:
        gate = tl.sigmoid(logits)
        grad *= (1 + part) * gate * (1.0 - gate)
    store_part(d_logits, grad, rows, here, part, n, N)
    u = load_part(product, rows, here, part, n, N)
    grad *= tl.load(alpha + part)
    if PER_STREAM:
        bent = tanh(u)
        grad *= 1.0 - bent * bent
    pull = grad * u
    if part == 2:
        store_part(d_product, grad * inverse[:, None, :], rows, here, part, n, N)
        pull = tl.sum(pull, 1)
    else:
        store_part(d_product, grad * inverse, rows, here, part, n, N)
    return (pull if PER_STREAM else tl.sum(pull, 1, keep_dims=True)), by_number


@triton.jit
def store_map_gradients(
    pre_sums,
    other_sums,
    d_pre,
    d_post,
    d_res,
    product,
    inverse_rms,
    alpha,
    bias,
    number,
    d_logits,
    d_product,
    d_scalar,
    shrinks,
    token,
    T,
    C,
    n: tl.constexpr,
    BT: tl.constexpr,
    PER_STREAM: tl.constexpr,
    MAP_BACKWARD: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIXED: tl.constexpr,
):
    """Of BT tokens from `token` on. x' = x phi / rms takes g to (g phi^T - x (g . x') / (C rms)) / rms: `d_product` is g / rms,
    `shrinks` the factor of x. `pre_sums` and `other_sums` are the sums over channels or None."""
    K: tl.constexpr = n * n + 2 * n
    N: tl.constexpr = triton.next_power_of_2(n)
    GROUPS: tl.constexpr = n if PER_STREAM else 1
    G: tl.constexpr = N if PER_STREAM else 1
    product, d_logits, d_product = at_token(product, token, K), at_token(d_logits, token, K), at_token(d_product, token, K)
    inverse_rms, shrinks = at_token(inverse_rms, token, GROUPS), at_token(shrinks, token, GROUPS)
    rows = tl.arange(0, BT)
    here = rows < T - token
    inverse = load_vector(inverse_rms, rows, here, GROUPS, GROUPS, G)
    pull = tl.zeros([BT, G], tl.float32)
    for part in tl.static_range(3):
        direct = d_pre if part == 0 else (d_post if part == 1 else d_res)
        grad = map_gradient(pre_sums if part == 0 else other_sums, direct, token, rows, here, part, n, N)
        one, by_number = map_backward(
            grad,
            product,
            alpha,
            bias,
            number,
            inverse,
            d_logits,
            d_product,
            rows,
            here,
            part,
            n,
            N,
            PER_STREAM,
            MAP_BACKWARD,
            SETTINGS,
            FIXED,
        )
        pull += one
        if part == 2 and d_scalar is not None:
            tl.store(at_token(d_scalar, token, 1) + rows, by_number, mask=here)
    shrink = pull * inverse * inverse / (C if PER_STREAM else n * C)
    store_vector(shrinks, shrink, rows, here, GROUPS, GROUPS, G)
