"""Writes run folders with the diagnostics of a training that never was: random maps for each token, multiplied for real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

TOKENS = 6


def write_run(
    folder: Path, kind: str, blocks: int = 3, streams: int = 4, steps: int = 40, interval: int = 10, seed: int = 0
) -> Path:
    """diagnostics.jsonl, metrics.jsonl and config.yaml of `folder`, which is returned."""
    folder.mkdir(parents=True)
    streams = 1 if kind == "none" else streams
    rng = np.random.default_rng(seed)
    s = average = 1.0
    metrics, diagnosed = [{"step": 0, "val_loss": 5.55}], []
    for step in range(1, steps + 1):
        loss = 2 + 3.5 * np.exp(-step / 15) + 0.03 * rng.normal()
        norm = 0.5 + 5 / step + 0.02 * rng.random()
        metrics.append({"step": step, "loss": loss, "grad_norm": norm, "lr": 1e-3, "tokens_per_s": 2500.0})
        if step % interval == 0:
            metrics[-1]["val_loss"] = loss + 0.05
            line = {"step": step, "kind": kind, "streams": streams, "sublayers": 2 * blocks, "loss": loss + 0.1}
            line |= _plain(2 * blocks, rng) if kind == "none" else _diagnosis(kind, 2 * blocks, streams, 0.3 + step / steps, s, rng)
            if kind == "harmonized":
                gain = max(line["composite"]["forward"][0], line["composite"]["backward"][0])
                average = 0.5 * average + 0.5 * gain
                s = min(1.0, max(0.05, s * 5.0 / average))
                line |= {"s": s, "gain_average": average}
            diagnosed.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(_without_nan(line)) + "\n" for line in diagnosed))
    (folder / "config.yaml").write_text(yaml.safe_dump({"residual": {"kind": kind, "streams": streams, "target_gain": 5.0}}))
    return folder


def drawn_maps(kind: str, shape: tuple[int, ...], streams: int, spread: float, s: float, rng: np.random.Generator) -> np.ndarray:
    """Maps of `kind`, [*shape, n, n]; the larger `spread`, the farther from the identity."""
    logits = rng.normal(size=(*shape, streams, streams))
    identity = np.eye(streams)
    if kind == "hc":
        return identity + 0.12 * spread * np.abs(logits) - 0.05 * spread * rng.normal(size=logits.shape)
    if kind == "harmonized":
        return identity + s * 0.12 * spread * logits
    birkhoff = np.exp(spread * logits + 4 * identity)
    for _ in range(20):
        birkhoff = birkhoff / birkhoff.sum(-2, keepdims=True)
        birkhoff = birkhoff / birkhoff.sum(-1, keepdims=True)
    basis = np.linalg.svd(np.ones((1, streams)))[2][1:].T  # of the complement of the mean
    u, _, vt = np.linalg.svd(basis.T @ (2 * identity + 0.3 * spread * logits) @ basis)
    isometry = 1 / streams + basis @ (u @ vt) @ basis.T
    return {"mhc": birkhoff, "isohc": isometry, "hybrid": 0.5 * birkhoff + 0.5 * isometry}[kind]


def _plain(sublayers: int, rng: np.random.Generator) -> dict:
    norms = np.cumsum(1 + rng.random(sublayers + 1)) / 10
    return {"stream_norm": norms[:, None].tolist(), "gradient": (2 / (1 + norms)).tolist()}


def _diagnosis(kind: str, L: int, n: int, spread: float, s: float, rng: np.random.Generator) -> dict:
    maps = drawn_maps(kind, (L, TOKENS), n, spread, s, rng)
    h_post = 1 + 0.2 * rng.normal(size=(L, n))
    h_pre = 1 / n + 0.05 * rng.normal(size=(L, n))
    products = [np.broadcast_to(np.eye(n), (TOKENS, n, n))]
    for h in maps[::-1]:
        products.insert(0, products[0] @ h)
    x = [np.broadcast_to(rng.normal(size=64), (TOKENS, n, 64))]
    for l in range(L):
        x.append(maps[l] @ x[-1] + h_post[l][:, None] * 0.3 * rng.normal(size=64))
    g = [rng.normal(size=(TOKENS, n, 64))]
    for h in maps[::-1]:
        g.insert(0, h.mT @ g[0] + 0.05 * rng.normal(size=g[0].shape))
    return {
        "gain": _gains(maps),
        "composite": _gains(np.stack(products[:L])),
        "distance": {
            "rows": np.abs(maps.sum(-1) - 1).max((1, 2)).tolist(),
            "columns": np.abs(maps.sum(-2) - 1).max((1, 2)).tolist(),
            "orthogonality": np.abs(maps.mT @ maps - np.eye(n)).max((1, 2, 3)).tolist(),
        },
        "maps": maps.mean(1).tolist(),
        "composite_map": products[0].mean(0).tolist(),
        "h_pre": h_pre.tolist(),
        "h_post": h_post.tolist(),
        "h_pre_norm": np.linalg.norm(h_pre, axis=1).tolist(),
        "h_post_norm": np.linalg.norm(h_post, axis=1).tolist(),
        "stream_norm": [np.sqrt((each**2).mean(-1)).mean(0).tolist() for each in x],
        "similarity": [_similarity(each) for each in x],
        "gradient": [float(np.linalg.norm(each)) for each in g],
        "transported": [float(np.linalg.norm(product.mT @ g[-1])) for product in products],
    }


def _gains(maps: np.ndarray) -> dict:
    """Of [L, tokens, n, n]."""
    return {"forward": np.abs(maps).sum(-1).max(-1).mean(1).tolist(), "backward": np.abs(maps).sum(-2).max(-1).mean(1).tolist()}


def _similarity(x: np.ndarray) -> float:
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    cosines = unit @ unit.mT
    n = x.shape[1]
    return float(cosines[:, ~np.eye(n, dtype=bool)].mean())


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
