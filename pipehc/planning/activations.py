"""Bytes that a stage keeps for one micro-batch, from its forward to its backward: planned, and as counted in the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipehc.config.schema import BYTES, Config
from pipehc.recompute.plan import cut, memory


class Activations(NamedTuple):
    """Bytes for one micro-batch on one stage (see `recompute.saved.SavedBytes`).

    streams: n*C numbers a token at the start of every recompute block. outputs: of every F, C a token. f: what F saves for itself,
    with embedding, loss and depth modules; not planned. connections: what hyper-connections save; with recomputation the maps,
    where Triton made them. rebuilt: with recomputation, what one block rebuilds, there for one micro-batch at a time; planned
    without the coefficients, which are a few dozen numbers a token and sub-layer, and x_l0, which is kept, is planned as if
    rebuilt.
    """

    streams: int
    outputs: int
    f: int | None
    connections: int
    rebuilt: int


def planned(config: Config) -> list[Activations] | None:
    """By stage, from the sizes alone: nC a block, C a sub-layer, (n + 2) C a rebuilt sub-layer, for a rank's part of the tokens.
    None without recomputation."""
    if not config.recompute.enabled:
        return None
    tokens = config.train.sequence_length // config.parallel.tp * config.train.micro_batch
    unit = tokens * config.model.hidden_size * BYTES[config.train.precision]
    streams, found = config.residual.width, []
    for blocks in config.stage_blocks():
        sublayers = 2 * len(blocks)
        numbers = memory(streams, sublayers, config.recompute.block)
        assert numbers.resident == streams * len(cut(sublayers, config.recompute.block))
        found.append(Activations(numbers.resident * unit, numbers.outputs * unit, None, 0, numbers.transient * unit))
    return found


def describe(stage: int, saved: Activations) -> str:
    """One line for people."""
    parts = {"streams": saved.streams, "F outputs": saved.outputs, "F": saved.f, "hyper-connections": saved.connections}
    kept = ", ".join(f"{name} {_mebibytes(size)}" for name, size in parts.items() if size)
    total = sum(size for size in parts.values() if size)
    rebuilt = f"; rebuilds {_mebibytes(saved.rebuilt)}" if saved.rebuilt else ""
    return f"stage {stage} keeps {_mebibytes(total)} a micro-batch: {kept}{rebuilt}"


def as_metrics(saved: Mapping[int, Activations]) -> dict[str, float]:
    """For metrics.jsonl, in bytes."""
    return {
        f"saved/stage{stage}/{name}": float(size)
        for stage, found in saved.items()
        for name, size in found._asdict().items()
        if size is not None
    }


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
