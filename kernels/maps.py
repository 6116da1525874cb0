# mypy: disable-error-code="assignment,misc,no-any-return"
"""Device functions between the product with phi and the maps: logits, then H_pre, H_post and H_res of every token.

A token's K = n*n + 2n numbers are in three parts: pre (n), post (n), res (n*n, row-major). Where every stream is projected alone
(raw HC) the last index of each part is the stream that the number comes from."""

from pipehc.kernels.language import tl, triton
from pipehc.kernels.matrices import diagonal, load_matrix, load_vector, store_matrix, store_vector


@triton.jit
def tanh(v):
    """Also exact to rounding for small v, where 1 - exp(-2v) cancels."""
    square = v * v
    series = v * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0 - square * (62.0 / 2835.0)))))
    e = tl.exp(-2.0 * tl.abs(v))
    rational = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(v) < 0.3, series, tl.where(v < 0, -rational, rational))


@triton.jit
def load_part(pointer, rows, here, part: tl.constexpr, n: tl.constexpr, N: tl.constexpr):
    """Part 0 or 1, [BT, N], or 2, [BT, N, N], of a contiguous [T, K] fp32 tensor."""
    if part < 2:
        value = load_vector(pointer + part * n, rows, here, n * n + 2 * n, n, N)
    else:
        value = load_matrix(pointer + 2 * n, rows, here, n * n + 2 * n, n, N)
    return value


@triton.jit
def store_part(pointer, value, rows, here, part: tl.constexpr, n: tl.constexpr, N: tl.constexpr):
    if part < 2:
        store_vector(pointer + part * n, value, rows, here, n * n + 2 * n, n, N)
    else:
        store_matrix(pointer + 2 * n, value, rows, here, n * n + 2 * n, n, N)


@triton.jit
def load_logits(product, alpha, bias, rows, here, part: tl.constexpr, n: tl.constexpr, N: tl.constexpr, PER_STREAM: tl.constexpr):
    """Logits of a part from `product`, x phi / rms(x)."""
    u = load_part(product, rows, here, part, n, N)
    first = tl.arange(0, 1)
    return tl.load(alpha + part) * (tanh(u) if PER_STREAM else u) + load_part(bias, first, first == 0, part, n, N)


@triton.jit
def map_of(
    product,
    alpha,
    bias,
    number,
    rows,
    here,
    part: tl.constexpr,
    n: tl.constexpr,
    N: tl.constexpr,
    PER_STREAM: tl.constexpr,
    MAP: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIXED: tl.constexpr,
):
    """H_pre or H_post, [BT, N], or H_res, [BT, N, N]. Where FIXED[part], the constant it is switched off to."""
    value = load_logits(product, alpha, bias, rows, here, part, n, N, PER_STREAM)
    if FIXED[part]:
        if part == 2:
            value = tl.zeros_like(value) + tl.where(diagonal(N), 1.0, 0.0)
        else:
            value = tl.zeros_like(value) + (1.0 if part == 1 else 1.0 / n)
    elif part == 2:
        value = MAP(value, number, n, SETTINGS)
    elif not PER_STREAM:
        value = (1 + part) * tl.sigmoid(value)
    return value
