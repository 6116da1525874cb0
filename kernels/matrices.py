# mypy: disable-error-code="assignment,misc"
"""Device functions on what every token has n or n*n numbers of: tiles [BT, N] and [BT, N, N], N the power of two from n on.

Spread over the threads like that, a matrix of 16 tokens takes two registers of a thread at n = 4, and the sums over its rows and
columns pass between neighbouring threads. Entries beyond n are loaded as zeros and never stored."""

from pipehc.kernels.language import tl, triton


@triton.jit
def _vector_places(rows, here, stride, n: tl.constexpr, N: tl.constexpr):
    j = tl.arange(0, N)[None, :]
    return rows[:, None] * stride + j, here[:, None] & (j < n)


@triton.jit
def _matrix_places(rows, here, stride, n: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]
    return rows[:, None, None] * stride + i * n + j, here[:, None, None] & (i < n) & (j < n)


@triton.jit
def load_vector(pointer, rows, here, stride, n: tl.constexpr, N: tl.constexpr):
    """[BT, N] from n fp32 numbers of every token, which lie `stride` apart."""
    at, mask = _vector_places(rows, here, stride, n, N)
    return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def load_matrix(pointer, rows, here, stride, n: tl.constexpr, N: tl.constexpr):
    """[BT, N, N] from n*n fp32 numbers of every token, row-major."""
    at, mask = _matrix_places(rows, here, stride, n, N)
    return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def store_vector(pointer, value, rows, here, stride, n: tl.constexpr, N: tl.constexpr):
    at, mask = _vector_places(rows, here, stride, n, N)
    tl.store(pointer + at, value, mask=mask)


@triton.jit
def store_matrix(pointer, value, rows, here, stride, n: tl.constexpr, N: tl.constexpr):
    at, mask = _matrix_places(rows, here, stride, n, N)
    tl.store(pointer + at, value, mask=mask)


@triton.jit
def inside(n: tl.constexpr, N: tl.constexpr):
    """[1, N, N]: which entries are the matrix's own."""
    j = tl.arange(0, N)
    return (j < n)[None, :, None] & (j < n)[None, None, :]


@triton.jit
def diagonal(N: tl.constexpr):
    """[1, N, N]: which entries lie on the diagonal."""
    j = tl.arange(0, N)
    return (j[:, None] == j[None, :])[None, :, :]


@triton.jit
def product(x, y, n: tl.constexpr):
    """Matrix products x y of [BT, N, N], by columns of x and rows of y: no layout changes, and no [BT, N, N, N] is ever held."""
    N: tl.constexpr = x.shape[1]
    i = tl.arange(0, N)
    out = tl.zeros_like(x)
    for k in tl.static_range(n):
        column = tl.sum(tl.where((i == k)[None, None, :], x, 0.0), 2, keep_dims=True)
        out += column * tl.sum(tl.where((i == k)[None, :, None], y, 0.0), 1, keep_dims=True)
    return out


@triton.jit
def transposed(x):
    return tl.permute(x, (0, 2, 1))


@triton.jit
def total(x):
    """[BT]: sums over whole matrices."""
    return tl.sum(tl.sum(x, 2), 1)
