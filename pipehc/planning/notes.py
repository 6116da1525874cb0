"""What a schedule's textbook figures (2x parameters, P+1 activations, the bubble) mean for one configuration.

Figures: DeepSeek-V3's comparison of schedules (spec section 5).
"""

from __future__ import annotations

from functools import lru_cache

from pipehc.config.schema import Config
from pipehc.config.stages import build_schedule
from pipehc.planning import parameters
from pipehc.schedules import Costs, Schedule, check, simulate


def human(number: float) -> str:
    """Three digits and K, M, B or T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return str(number)


def mebibytes(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"


def live_microbatches(config: Config, dp: int) -> list[int]:
    """For each pipeline rank the most micro-batches whose activations of one stage it keeps at once, over all its stages."""
    ranks, microbatches = config.parallel.pp, config.microbatches(dp)
    if config.schedule.name == "1f1b":
        return [min(ranks - rank, microbatches) for rank in range(ranks)]
    if config.schedule.name.startswith("dualpipe"):
        return [config.stages + 1] * ranks
    return [round(live / config.placement.share) for live in check(_schedule(config, dp)).peak_live]


def notes(config: Config, dp: int) -> list[str]:
    """Paragraphs on the memory and the idle time of the configured schedule."""
    known = {"1f1b": _one_f_one_b, "dualpipe": _dualpipe, "dualpipev": _dualpipev}
    return known.get(config.schedule.name, _simulated)(config, dp)


def _simulated(config: Config, dp: int) -> list[str]:
    live, result = live_microbatches(config, dp), simulate(_schedule(config, dp), Costs())
    return [
        f"Activations: a rank keeps up to {max(live)} micro-batches of a stage at once, {min(live)} where it keeps the fewest.",
        f"Bubble, simulated: a rank idles {result.bubble:.1f} t of {result.makespan:.1f} t a step "
        f"({100 * result.bubble / result.makespan:.1f} %). {_UNITS}",
    ]


@lru_cache(maxsize=1)
def _schedule(config: Config, dp: int) -> Schedule:
    return build_schedule(config, config.parallel.pp, config.microbatches(dp))


def _one_f_one_b(config: Config, dp: int) -> list[str]:
    ranks = config.parallel.pp
    return [
        f"Activations: rank r keeps at most pp - r micro-batches of its stage: {live_microbatches(config, dp)[0]} on rank 0, "
        "1 on the last.",
        f"Bubble (P-1)(F+B): a rank idles {_share(config, dp, 3 * (ranks - 1))}. {_UNITS}",
    ]


def _dualpipe(config: Config, dp: int) -> list[str]:
    ranks, tp, ep, replicas = config.parallel.pp, config.parallel.tp, config.parallel.ep, 2 * dp
    one_lane = max(stage.on_rank(tp, ep) for stage in parameters.stages(config))
    experts = f" (routed experts: over {replicas * tp // ep})" if ep > 1 or tp > 1 else ""
    return [
        f"'2x parameters': two directions need two replicas of every stage; rank r holds stage r of the one and stage "
        f"{ranks - 1} - r of the other. Here that is at most {human(max(parameters.ranks(config)))} parameters a rank, against "
        f"{human(one_lane)} under 1F1B over the same {ranks} ranks. Gradients of the replicas are summed every step; optimizer "
        f"state exists once, sharded over the {replicas} ranks that hold "
        f"{'a part of ' if tp > 1 else ''}a stage{experts}.",
        f"'P+1 activations': {_live(config, dp)} 1F1B would keep {min(ranks, config.microbatches(dp))} on rank 0 and 1 on the "
        "last: the fullest rank needs about the same, but here every rank needs it.",
        f"Bubble (P/2-1)(F&B + B - 3W): a rank idles {_share(config, dp, ranks - 2)}; 1F1B over the same ranks "
        f"{_share(config, dp, 3 * (ranks - 1))}. {_MINUS_3W} {_UNITS}",
    ]


def _dualpipev(config: Config, dp: int) -> list[str]:
    ranks = config.parallel.pp
    return [
        f"'2x parameters' compares with 1F1B over {2 * ranks} ranks. Here no stage exists twice: rank r holds stages r and "
        f"{2 * ranks - 1} - r of {2 * ranks}, at most {human(max(parameters.ranks(config)))} parameters, about 1/{ranks} of the "
        f"model, as under 1F1B over {ranks} ranks.",
        f"'P+1 activations' counts stages, P = {2 * ranks}: {_live(config, dp)} A stage is half of what it is under 1F1B over "
        f"{ranks} ranks, which would keep {min(ranks, config.microbatches(dp))} of the whole ones on rank 0.",
        f"Bubble (P/2-1)(F&B + B - 3W), P = {2 * ranks} stages of half the size: a rank idles {_share(config, dp, ranks - 1)}; "
        f"1F1B over {ranks} ranks {_share(config, dp, 3 * (ranks - 1))}. {_MINUS_3W} {_UNITS}",
    ]


_MINUS_3W = "The -3W are weight gradients moved into waiting time: no other rank waits for them."
_UNITS = (
    "(t: forward of 1/pp of the model for one micro-batch; assumed: input gradient I and weight gradient W take as long, "
    "B = I + W, an overlapped pair F&B takes F + B, messages take nothing.)"
)


def _live(config: Config, dp: int) -> str:
    live, message = live_microbatches(config, dp)[0], config.stage_message_bytes()
    return (
        f"a rank keeps up to {live} micro-batches of a stage at once, over both its stages. Their stage inputs alone are "
        f"{live} x {mebibytes(message)} = {mebibytes(live * message)}."
    )


def _share(config: Config, dp: int, idle: int) -> str:
    """Idle time of a rank, in t, as a part of the step: every micro-batch costs a rank 3 t of work."""
    step = 3 * config.microbatches(dp) + idle
    return f"{idle} t of {step} t a step ({100 * idle / step:.1f} %)"
