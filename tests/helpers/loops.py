"""The mathematics of spec section 2 once more, for one token at a time, with scalar loops: the tests' independent reference."""

import numpy as np


def sigmoid(v):
    return 1.0 / (1.0 + np.exp(-v))


def sinkhorn(logits, iterations):
    n = len(logits)
    m = np.exp(logits - logits.max())
    for _ in range(iterations):
        for j in range(n):
            m[:, j] /= sum(m[i, j] for i in range(n))
        for i in range(n):
            m[i, :] /= sum(m[i, j] for j in range(n))
    return m


def polar_on_complement(logits):
    """e0 e0^T + U polar(U^T logits U) U^T with an explicit basis U and an SVD."""
    n = len(logits)
    full, _ = np.linalg.qr(np.column_stack([np.ones(n), np.eye(n)[:, : n - 1]]))
    basis = full[:, 1:]
    left, _, right = np.linalg.svd(basis.T @ logits @ basis)
    return np.full((n, n), 1.0 / n) + basis @ left @ right @ basis.T


def h_res(kind, logits, *, iterations=20, scalar=None):
    n = len(logits)
    if kind == "birkhoff":
        return sinkhorn(logits, iterations)
    if kind == "isometric":
        return polar_on_complement(logits)
    if kind == "hybrid":
        return (1 - scalar) * polar_on_complement(logits) + scalar * sinkhorn(logits, iterations)
    if kind == "harmonized":
        return np.eye(n) + scalar * (logits - np.eye(n))
    assert kind == "identity_offset"
    return logits


def coefficients(kind, x, phi, alpha, bias, **settings):
    """(h_pre [n], h_post [n], h_res [n, n]) of one token x [n, C]."""
    n, channels = x.shape
    columns = n * n + 2 * n
    which = [0] * n + [1] * n + [2] * n * n
    logits = np.zeros(columns)
    for k in range(columns):
        if kind in ("identity_offset", "harmonized"):
            row, j = divmod(k, n)
            norm = np.sqrt(np.mean(x[j] ** 2) + 1e-20)
            logits[k] = alpha[which[k]] * np.tanh(sum(x[j, c] * phi[c, row] for c in range(channels)) / norm) + bias[k]
        else:
            norm = np.sqrt(np.mean(x**2) + 1e-20)
            product = sum(x[j, c] * phi[j * channels + c, k] for j in range(n) for c in range(channels))
            logits[k] = alpha[which[k]] * product / norm + bias[k]
    res = h_res(kind, logits[2 * n :].reshape(n, n), **settings)
    if kind in ("identity_offset", "harmonized"):
        return logits[:n], logits[n : 2 * n], res
    return sigmoid(logits[:n]), 2 * sigmoid(logits[n : 2 * n]), res


def pre(x, h_pre):
    return np.array([sum(h_pre[j] * x[j, c] for j in range(len(x))) for c in range(x.shape[1])])


def post_res(x, f, h_post, h_res):
    n, channels = x.shape
    return np.array([[sum(h_res[i, j] * x[j, c] for j in range(n)) + h_post[i] * f[c] for c in range(channels)] for i in range(n)])
