"""DeepSeek's published overlapped pair, and what the simulator says of ours on the same work.

Published (the profile of one pair over 4 MoE layers of DeepSeek-V3, 4096 tokens a sequence, experts over 64 H800, no stage
messages): 129.0 ms in all, compute busy 124.4, all-to-alls busy 113.0, of which 108.9 (96.3 %) under computation.

It does not say what single nodes take. Here the published compute is divided over them by the FLOPs of a DeepSeek-V3 layer at
one rate, and the published all-to-all over dispatch and combine of both directions equally, or one to two (dispatch in FP8,
combine in BF16): a figure for ours is a simulation of that, and its range over other divisions says how much hangs on it.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from pipehc.schedules import Costs
from pipehc.schedules.pair_time import PairTimes, pair_times, steps_of

LAYERS = 4
PUBLISHED = PairTimes(whole=129.0, compute=124.4, all_to_all=113.0, exposed=4.1)

# FLOPs of one token in a layer: 2 per weight, in millions. Attention: MLA of 7168 channels, 128 heads of 128 + 64, ranks 1536 and
# 512; its core sees 2048 keys on average, and in the backward does 2.5 times its forward. FFN: 8 of 256 experts and a shared one.
PROJECTIONS = 2 * (7168 * 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 * 128 * 256 + 128 * 128 * 7168) / 1e6
CORE = 2 * 2048 * 128 * (192 + 128) / 1e6
EXPERTS = 2 * 9 * 3 * 7168 * 2048 / 1e6
SHARES = {
    ("F", "attention"): PROJECTIONS + CORE,
    ("B", "attention"): PROJECTIONS + 2.5 * CORE,
    ("W", "attention"): PROJECTIONS,
    ("F", "mlp"): EXPERTS,
    ("B", "mlp"): EXPERTS,
    ("W", "mlp"): EXPERTS,
}


class Division(NamedTuple):
    """attention: factor on the share of attention. combine: how much longer than a dispatch's all-to-all a combine's is."""

    attention: float
    combine: float


BY_FLOPS = Division(1.0, 1.0)


def costs(division: Division = BY_FLOPS) -> Costs:
    """Of a stage of 4 such layers, whose pair has the published compute and all-to-alls."""
    shares = {key: share * (division.attention if key[1] == "attention" else 1.0) for key, share in SHARES.items()}
    rate = PUBLISHED.compute / LAYERS / sum(shares.values())
    move = PUBLISHED.all_to_all / LAYERS / (2 * (1 + division.combine))
    # The backward of a combine sends what a dispatch does, and the other way round.
    moves = {("F", "dispatch"): move, ("F", "combine"): move * division.combine}
    moves |= {("B", "combine"): move, ("B", "dispatch"): move * division.combine}
    forward, backward, weight = [], [], []
    for layer in range(LAYERS):
        for kind in ("attention", "dispatch", "mlp", "combine", "mlp_post"):
            queue = "communication" if kind in ("dispatch", "combine") else "compute"
            for what, found in (("F", forward), ("B", backward)):
                found.append((f"{layer}.{kind}", queue, shares.get((what, kind), 0.0) * rate or moves.get((what, kind), 0.0)))
            if kind in ("attention", "mlp"):
                weight.append((f"{layer}.{kind}", "compute", shares["W", kind] * rate))
    return Costs(nodes={(0, "F"): forward, (0, "B"): backward[::-1], (0, "W"): weight[::-1]})


def ours(division: Division = BY_FLOPS) -> PairTimes:
    """Our pair on that work, simulated."""
    return pair_times(steps_of(costs(division), 0, 0))


def spread() -> tuple[PairTimes, PairTimes]:
    """The fastest and the slowest of ours, with attention at half to twice its share, and combine once or twice a dispatch."""
    found = [ours(Division(*division)) for division in product((0.5, 0.75, 1.0, 1.5, 2.0), (1.0, 2.0))]
    return min(found), max(found)
