"""Where rules for the list scheduler come from: plain priorities, steady states, schedules that exist; and random changes."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from pipehc.schedules.schedule import Schedule
from pipehc.schedules.search.dispatch import NEVER, Rules
from pipehc.schedules.search.patterns import live, steady_state
from pipehc.schedules.search.problem import FORWARD, INPUT, PAIR, WEIGHT, Op, Problem
from pipehc.schedules.spans import Span


def plain(problem: Problem) -> Rules:
    """Never idle: backwards, then forwards, then weight gradients, but these first when memory is full. Always gets to the end."""
    chunks, unit = len(problem.rank), problem.unit
    keys = tuple([[start] * problem.count for _ in range(chunks)] for start in (unit, 0.0, 2 * unit))
    never_idle = ([NEVER] * chunks, [NEVER] * chunks, [NEVER] * chunks)
    return Rules(keys, never_idle, problem.limit, 3 * unit, problem.pair_scale < 1)


def priorities(problem: Problem, random: Random) -> Rules:
    """One key for all micro-batches of a chunk and kind: backwards first or forwards first, weight gradients last."""
    unit = problem.unit
    spread = random.choice((0.0, 0.3, 1.0)) * unit
    base = (0.0, unit, 2 * unit) if random.random() < 0.5 else (unit, 0.0, 2 * unit)
    keys = tuple([[start + spread * random.random()] * problem.count for _ in problem.rank] for start in base)
    limit = problem.limit
    if random.random() < 0.5:
        limit = [max(1, min(most, round(most * random.uniform(0.3, 1.0)))) for most in limit]
    return _rules(problem, random, keys, limit)


def steady(problem: Problem, random: Random, attempts: int = 40) -> Rules | None:
    """Keys of a random steady state whose activations fit, or nearly; None if no attempt gave one."""
    least = max(problem.work) / problem.count
    for _ in range(attempts):
        interval = least * (1 + random.choice((0.0, 0.0, 0.01, 0.03, 0.06, 0.1)))
        offsets = steady_state(problem, interval, random, random.choice((0.0, 0.3, 0.7, 1.0)), random.choice((0.0, 0.0, 0.05, 0.2)))
        if offsets is not None and live(problem, interval, offsets) <= 1.15 * problem.slots:
            keys = tuple([[start + k * interval for k in range(problem.count)] for start in starts] for starts in offsets)
            return _rules(problem, random, keys, problem.limit)
    return None


def imitate(problem: Problem, schedule: Schedule, spans: Sequence[Span]) -> list[Rules]:
    """Keys are the start times in `spans`, of `schedule` on the problem's placement; from keeping its order to never idling."""
    keys = tuple([[0.0] * problem.count for _ in problem.rank] for _ in range(3))
    chunk_of = {problem.action("F", c, 0): c for c in range(len(problem.rank))}
    for span in spans:
        if span.queue != "compute":
            continue
        first = schedule.lane_microbatches(span.lane).start
        chunk = chunk_of.get(problem.action("F", 0, 0)._replace(stage=span.stage, lane=span.lane, microbatch=first))
        if chunk is None:
            continue  # the mirror image
        k = span.microbatch - first
        if span.kind == "B":
            keys[INPUT][chunk][k] = span.start
            keys[WEIGHT][chunk][k] = (span.start + span.end) / 2
        else:
            keys["FIW".index(span.kind)][chunk][k] = span.start
    pairs = problem.pair_scale < 1
    return [
        Rules(keys, tuple([patience] * len(problem.rank) for patience in patiences), problem.limit, 0.0, pairs)
        for patiences in ((-NEVER, -NEVER, -NEVER), (-NEVER, 0.0, 0.0), (0.0, 0.0, 0.0), (NEVER, NEVER, NEVER))
    ]


def retrace(problem: Problem, rules: Rules, rows: list[list[Op]]) -> Rules:
    """The same rules with the start times that they led to as keys."""
    keys = tuple([[0.0] * problem.count for _ in problem.rank] for _ in range(3))
    for row in rows:
        for op in row:
            if op.kind == PAIR and op.partner is not None:
                chunk, k = op.partner
                keys[FORWARD][op.chunk][op.microbatch] = op.start
                keys[INPUT][chunk][k] = keys[WEIGHT][chunk][k] = op.start
            else:
                keys[op.kind][op.chunk][op.microbatch] = op.start
    return Rules(keys, rules.patience, rules.limit, rules.pressure, rules.pairs)


def change(problem: Problem, rules: Rules, random: Random) -> Rules:
    """One to three random changes: of the keys of some micro-batches, a patience, a limit, the pressure, or of pairing."""
    unit, count, chunks = problem.unit, problem.count, len(problem.rank)
    keys = [list(rows) for rows in rules.keys]
    patience = [list(row) for row in rules.patience]
    limit, pressure, pairs = list(rules.limit), rules.pressure, rules.pairs
    for _ in range(random.choice((1, 1, 2, 3))):
        what = random.random()
        if what < 0.75:
            rows, chunk = random.choice(keys), random.randrange(chunks)
            first, last = _range(count, random)
            shift = random.gauss(0.0, 1.0) * unit * random.choice((0.3, 1.0, 3.0))
            rows[chunk] = [key + shift if first <= k < last else key for k, key in enumerate(rows[chunk])]
        elif what < 0.88:
            kind, value = random.randrange(3), random.choice((-NEVER, 0.0, 0.25 * unit, 0.5 * unit, unit, NEVER))
            if random.random() < 0.5:
                patience[kind][random.randrange(chunks)] = value
            else:
                patience[kind] = [value] * chunks
        elif what < 0.95:
            chunk = random.randrange(chunks)
            limit[chunk] = max(1, min(problem.limit[chunk], limit[chunk] + random.choice((-2, -1, 1, 2))))
        elif what < 0.98 or problem.pair_scale >= 1:
            pressure = random.choice((0.0, 1.0, 2.0, 4.0, 100.0)) * unit
        else:
            pairs = not pairs
    return Rules(tuple(keys), tuple(patience), limit, pressure, pairs)


def _range(count: int, random: Random) -> tuple[int, int]:
    """All micro-batches, the first few, the last few, or some in between."""
    what = random.random()
    if what < 0.4:
        return 0, count
    first = random.randrange(count)
    last = min(count, first + 1 + int(random.expovariate(0.3)))
    return (first, count) if what < 0.5 else (0, last) if what < 0.6 else (first, last)


def _rules(problem: Problem, random: Random, keys: tuple[list[list[float]], ...], limit: list[int]) -> Rules:
    unit, chunks = problem.unit, len(problem.rank)
    forward = random.choice((-NEVER, 0.0, unit, NEVER))
    backward = random.choice((0.0, unit, NEVER))
    weight = random.choice((-NEVER, 0.0, 0.0, 0.5 * unit, unit, NEVER))
    pressure = random.choice((0.0, 1.5, 3.0, 100.0)) * unit
    pairs = problem.pair_scale < 1 and random.random() < 0.8
    return Rules(keys, ([forward] * chunks, [backward] * chunks, [weight] * chunks), limit, pressure, pairs)
