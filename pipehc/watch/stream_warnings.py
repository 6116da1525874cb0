"""What the figures of the streams warn of, in words: what runs away on the residual path shows there before the loss shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ALIKE = 0.98
"""A cosine similarity of streams, mean over depth, from which on they are as good as copies."""

APART = 0.9
"""One below which they are not."""

SPREAD = 1e3
"""How many times larger the gradient may be at one depth than at another."""

LEAST_READ = 1e-3
"""Of the norm of H_pre: below, a sub-layer reads next to nothing."""

PATIENCE = 10
"""Diagnosed steps until streams that have never been apart are told of: all starts have equal streams."""

Figures = Mapping[str, Any]


def summary(figures: Figures) -> dict[str, float]:
    """The figures that fit into one number each; infinite where one of theirs is no number."""
    gradient = list(filter(None, figures["gradient"]))  # 0: of what is frozen
    found = {"gradient_spread": _largest(gradient) / min(gradient) if gradient and _finite(gradient) else _largest(gradient)}
    found["stream_norm"] = _largest(value for place in figures["stream_norm"] for value in place)
    if "composite" in figures:
        found |= {f"composite_{way}": _largest(values) for way, values in figures["composite"].items()}
        found |= {f"distance_{name}": _largest(values) for name, values in figures["distance"].items()}
        found["h_pre_norm"] = min(figures["h_pre_norm"]) if _finite(figures["h_pre_norm"]) else math.inf
    if "similarity" in figures:
        alike = figures["similarity"]
        found["similarity"] = sum(alike) / len(alike) if _finite(alike) else math.inf
    return found


class StreamWarnings:
    """Tells each trouble once; again when it has gone away in between, or has doubled."""

    def __init__(self, gain_bound: float) -> None:
        self._bound = gain_bound
        self._told: dict[str, float] = {}
        self._seen = 0
        self._apart = False

    def look(self, figures: Figures) -> list[str]:
        """The warnings of one diagnosed step. figures: null stands for what is no number, as in a line of the file."""
        figures = _numbers(figures)
        self._seen += 1
        one = summary(figures)
        now = {name: (size, text) for name, size, text in self._troubles(figures, one)}
        self._told = {name: size for name, size in self._told.items() if name in now}
        new = [name for name, (size, _) in now.items() if name not in self._told or size > 2 * self._told[name]]
        self._told |= {name: now[name][0] for name in new}
        return [now[name][1] for name in new]

    def _troubles(self, figures: Figures, one: Mapping[str, float]) -> Iterator[tuple[str, float, str]]:
        """Name, size and words of each."""
        for way, what in (("forward", "signals"), ("backward", "gradients")):
            size = one.get(f"composite_{way}", 0.0)
            if size > self._bound:
                place = _where(figures["composite"][way])
                yield (
                    way,
                    size,
                    (
                        f"{what} grow up to {size:.3g} times on the residual path alone, from sub-layer {place} to the end: the "
                        f"{way} composite gain is above diagnostics.gain_bound = {self._bound:g}"
                    ),
                )
        if one["gradient_spread"] > SPREAD:
            gradient, times = figures["gradient"], one["gradient_spread"]
            most = _where(gradient)
            least = min((k for k, value in enumerate(gradient) if value != 0), key=gradient.__getitem__)
            text = (
                f"the gradient of the streams is {times:.3g} times as large {_place(most, gradient)} as {_place(least, gradient)}"
            )
            if not math.isfinite(times):
                text = f"the gradient of the streams is no number {_place(most, gradient)}"
            yield "spread", times, text
        if not all(math.isfinite(one.get(name, 0.0)) for name in ("stream_norm", "similarity", "h_pre_norm")):
            yield "norm", math.inf, "a stream or a map holds what is no number"
        if one.get("h_pre_norm", 1.0) < LEAST_READ:
            least = figures["h_pre_norm"].index(one["h_pre_norm"])
            yield "read", 1.0, f"sub-layer {least} reads next to nothing: the norm of its H_pre is {one['h_pre_norm']:.1e}"
        alike = one.get("similarity", 0.0)
        self._apart |= alike < APART
        if alike > ALIKE and (self._apart or self._seen >= PATIENCE):
            become = "have become" if self._apart else "are still"
            yield "alike", 1.0, f"the streams {become} all but copies of each other: their cosine similarity is {alike:.4f}"


def _numbers(value: Any) -> Any:
    match value:
        case None:
            return math.nan
        case Mapping():
            return {name: _numbers(part) for name, part in value.items()}
        case list():
            return [_numbers(part) for part in value]
    return value


def _finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _place(k: int, values: Sequence[float]) -> str:
    return "at the end" if k + 1 == len(values) else f"before sub-layer {k}"


def _largest(values: Any) -> float:
    return max((value if math.isfinite(value) else math.inf for value in values), default=0.0)


def _where(values: Sequence[float]) -> int:
    """The place of the largest, or of the first that is no number."""
    return max(range(len(values)), key=lambda i: values[i] if math.isfinite(values[i]) else math.inf)
