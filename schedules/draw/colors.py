"""One palette for every drawing: hue is the kind of work, tint the chunk of the rank that it belongs to."""

from __future__ import annotations

from pipehc.schedules.spans import Span

KINDS = {
    "F": ("#2f6fbd", "forward"),
    "B": ("#12805c", "backward"),
    "I": ("#1f9d74", "input gradient"),
    "W": ("#e08e0b", "weight gradient"),
    "R": ("#a14fb0", "recompute"),
    "exchange": ("#c9b458", "expert all-to-all"),
    "activation": ("#7b97bd", "activation message"),
    "gradient": ("#86b79f", "gradient message"),
    "wait": ("#e9c6c6", "wait for a message"),
}
OTHER = "#8c8c8c"


def hue(span: Span) -> str:
    """The key of `KINDS` that a span is drawn and explained by."""
    if span.queue == "wait":
        return "wait"
    # Nodes are named BLOCK.KIND.
    return "exchange" if span.queue == "node" and span.what.endswith((".dispatch", ".combine")) else span.kind


def color(kind: str, chunk: int = 0, chunks: int = 1) -> str:
    """Hex colour of `kind` on the rank's `chunk`-th of `chunks` stages: the later, the lighter."""
    base = KINDS.get(kind, (OTHER, ""))[0]
    lighten = 0.5 * chunk / max(1, chunks - 1)
    channels = (int(base[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * lighten):02x}" for c in channels)


def ink(background: str) -> str:
    """Black or white, whichever reads better on `background`."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
