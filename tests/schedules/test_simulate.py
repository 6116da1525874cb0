"""Simulation: closed forms, an independent simulator, and what happens on links and queues, by hand-made examples."""

from __future__ import annotations

import importlib.util
from itertools import pairwise, product
from pathlib import Path
from random import Random

import pytest

from pipehc.schedules import Action, Costs, Pair, Program, Schedule, build, compile, simulate
from pipehc.schedules.actions import actions_of, parse
from pipehc.schedules.bounds import lower_bound
from pipehc.schedules.placement import Placement, bidirectional, linear, vee
from pipehc.schedules.program import Instruction, Post, Run, Send, Wait
from pipehc.schedules.schedule import lane_microbatches

REFERENCE = Path(__file__).parents[3] / "shared" / "tools" / "simulate.py"


def oracle(schedule: Schedule, costs: Costs) -> float:
    """Makespan by relaxation over the rows themselves: no program, no queues. Receives are posted at once."""
    place, factors = schedule.placement, costs.stage_factors(schedule.placement)
    ends: dict[tuple[str, int, int, int], float] = {}  # F and I only, on their own rank
    arrived: dict[tuple[str, int, int, int], float] = {}
    while True:
        before = dict(ends), dict(arrived)
        makespan = 0.0
        for rank, row in enumerate(schedule.rows):
            now = 0.0
            results = []  # in the order in which they leave
            for cell in row:
                scale = costs.pair_scale if isinstance(cell, Pair) else 1.0
                for kind, stage, microbatch, lane in actions_of(cell):
                    size = scale * factors[lane][stage]
                    if kind == "F" and stage:
                        now = max(now, arrived.get(("F", lane, stage, microbatch), 0.0))
                    elif kind in "BI" and stage + 1 < place.stages:
                        now = max(now, arrived.get(("I", lane, stage, microbatch), 0.0))
                    for part in {"B": "IW"}.get(kind, kind):
                        now += costs.time(part) * size
                        if part != "W":
                            ends[part, lane, stage, microbatch] = now
                            results.append((part, lane, stage, microbatch))
            makespan = max(makespan, now)
            free: dict[int, float] = {}
            for part, lane, stage, microbatch in results:
                target = stage + (1 if part == "F" else -1)
                if not 0 <= target < place.stages:
                    continue
                end, peer = ends[part, lane, stage, microbatch], place.rank(lane, target)
                if peer != rank:
                    free[peer] = max(end, free.get(peer, 0.0)) + costs.link
                    end = free[peer] + costs.latency
                arrived[part, lane, target, microbatch] = end
        if (ends, arrived) == before:
            return makespan


def late_release(program: Program) -> Program:
    """The same program, but a pair takes both inputs before it starts and releases both results at its end."""
    rows = []
    for row in program.instructions:
        out: list[Instruction] = []
        i = 0
        while i < len(row):
            pair = next((x.pair for x in row[i:] if isinstance(x, Run)), None)
            last = max((j for j, x in enumerate(row) if isinstance(x, Run) and pair is not None and x.pair == pair), default=-1)
            if pair is None or last < i:
                # not in a pair: up to and with the next Run, and its Send
                stop = next((j for j in range(i, len(row)) if isinstance(row[j], Run)), len(row) - 1) + 1
            else:
                stop = last + 1
            while stop < len(row) and isinstance(row[stop], Send):
                stop += 1
            part = row[i:stop]
            order = {Post: 0, Wait: 1, Run: 2, Send: 3}
            out += sorted((_bare(x) for x in part), key=lambda x: order[type(x)])
            i = stop
        rows.append(tuple(out))
    return Program(program.schedule, tuple(rows))


def _bare(instruction: Instruction) -> Instruction:
    """Without events: on one compute queue and with free links they order nothing more."""
    if isinstance(instruction, Wait):
        return instruction
    if isinstance(instruction, Post):
        return instruction._replace(after=())
    return instruction._replace(after=(), event=None)


GRID = [(1.0, 1.0, 1.0), (40.0, 40.0, 40.0), (0.3, 0.3, 0.1), (2.0, 3.0, 1.5), (1.0, 2.0, 0.5), (3.0, 4.0, 2.0)]


@pytest.mark.parametrize(("f", "b", "w"), GRID)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 9), (8, 20)])
def test_bubble_of_1f1b(f: float, b: float, w: float, ranks: int, microbatches: int) -> None:
    result = simulate(compile(build("1f1b", ranks, microbatches), split_backward=False), Costs(f, b, w))
    assert result.bubble == pytest.approx((ranks - 1) * (f + b + w))
    assert result.peak_live == tuple(min(microbatches, ranks - r) for r in range(ranks))


@pytest.mark.parametrize(("f", "b", "w"), GRID)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 9), (8, 20)])
def test_bubble_of_zb_h1(f: float, b: float, w: float, ranks: int, microbatches: int) -> None:
    """(P-1)(F+B-2W), B the full backward."""
    result = simulate(build("zb_h1", ranks, microbatches), Costs(f, b, w))
    assert result.bubble == pytest.approx((ranks - 1) * (f + b - w))
    assert max(result.peak_live) == ranks


@pytest.mark.parametrize(("f", "b", "w"), GRID)
@pytest.mark.parametrize(
    ("name", "ranks", "half"), [("dualpipe", 4, 2), ("dualpipe", 8, 4), ("dualpipev", 4, 4), ("dualpipev", 3, 3)]
)
def test_bubble_of_dualpipe(name: str, ranks: int, half: int, f: float, b: float, w: float) -> None:
    """(P/2-1)(F&B + B - 3W), B the full backward, if pairs release at their end: exact for F = I, else a bit too large."""
    schedule, costs = build(name, ranks, 20), Costs(f, b, w)
    result = simulate(late_release(compile(schedule, split_backward=False)), costs)
    closed_form = (half - 1) * schedule.placement.share * ((f + b + w) + (b + w) - 3 * w)
    assert result.bubble <= closed_form + 1e-9
    if f == b:
        assert result.bubble == pytest.approx(closed_form)
    assert simulate(schedule, costs).makespan <= result.makespan + 1e-9


def test_early_release_of_the_issue() -> None:
    """F = I = W = 40, P = 8, M = 20: dualpipe at most 2640, dualpipev at most 2540. Then P = 4, M = 16 on slow links."""
    assert simulate(build("dualpipe", 8, 20), Costs(40, 40, 40)).makespan <= 2640
    assert simulate(build("dualpipev", 8, 20), Costs(40, 40, 40)).makespan <= 2540
    assert simulate(late_release(compile(build("dualpipe", 8, 20), split_backward=False)), Costs(40, 40, 40)).makespan == 2640
    for link, most in ((15, 3046), (30.7, 3156)):
        assert simulate(build("dualpipe", 4, 16), Costs(60, 60, 60, link=link)).makespan <= most


def random_problem(random: Random) -> tuple[Schedule, Costs]:
    name = random.choice(["gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipe", "dualpipev"])
    ranks = random.choice([2, 4])
    schedule = build(name, ranks, 2 * ranks + random.choice([0, 2, 4, 6]))
    f, b, w, link, latency = (random.uniform(0.1, 4.0) for _ in range(5))
    weights = tuple(random.uniform(0.5, 2.0) for _ in range(ranks))
    pair = random.choice([None, 0.8 * (f + b + w)])
    link, latency = (random.choice([0.0, x]) for x in (link, latency))
    return schedule, Costs(f, b, w, pair=pair, link=link, latency=latency, weights=weights)


@pytest.mark.parametrize("seed", range(40))
def test_equals_independent_simulation(seed: int) -> None:
    schedule, costs = random_problem(Random(seed))
    result = simulate(compile(schedule, ahead=1000), costs)
    assert result.makespan == pytest.approx(oracle(schedule, costs), rel=1e-12)
    assert result.lower_bound <= result.makespan + 1e-9
    assert simulate(schedule, costs).makespan >= result.makespan - 1e-9  # fewer receives posted ahead: never faster
    for rank, busy in enumerate(result.busy):
        spans = sorted((s.start, s.end) for s in result.spans if s.rank == rank and s.queue == "compute")
        assert sum(end - start for start, end in spans) == pytest.approx(busy)
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(spans))


@pytest.mark.skipif(not REFERENCE.exists(), reason="the shared reference simulator is not here")
@pytest.mark.parametrize("seed", range(40, 60))
def test_equals_reference_tool(seed: int) -> None:
    spec = importlib.util.spec_from_file_location("reference_simulate", REFERENCE)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    __import__("sys").modules[spec.name] = tool
    spec.loader.exec_module(tool)
    random = Random(seed)
    schedule, _ = random_problem(random)
    stages, share = schedule.placement.stages, schedule.placement.share
    costs = Costs(random.uniform(1, 3), random.uniform(1, 3), random.uniform(1, 3), link=random.uniform(0, 2))

    def token(action: Action) -> str:
        return f"{action.stage + stages * action.lane}{action.kind}{action.microbatch}"

    lists = {}
    for rank, row in enumerate(schedule.rows):
        cells = [a._replace(kind=k) for cell in row for a in actions_of(cell) for k in ("IW" if a.kind == "B" else a.kind)]
        lists[rank] = [token(action) for action in cells]
    cost = {"F": costs.f * share, "I": costs.b * share, "W": costs.w * share}
    found = tool.simulate(
        tool.parse_lists(lists), lambda kind, _: cost[kind], stages * schedule.placement.lanes, chain_len=stages, tx=costs.link
    )
    result = simulate(compile(schedule, ahead=1000), costs)
    assert result.makespan == pytest.approx(found["makespan"], rel=1e-12)
    assert result.busy == pytest.approx(tuple(found["busy"][r] for r in range(schedule.ranks)))
    assert [x / share for x in result.peak_live] == pytest.approx([found["peak_live"][r] for r in range(schedule.ranks)])


def two_ranks(microbatches: int) -> Schedule:
    first = [Action("F", 0, m) for m in range(microbatches)] + [Action("B", 0, m) for m in range(microbatches)]
    second = [a for m in range(microbatches) for a in (Action("F", 1, m), Action("B", 1, m))]
    return Schedule("two", linear(2), microbatches, (tuple(first), tuple(second)))


def test_links_are_fifos_and_stalls_are_exposed() -> None:
    costs = Costs(f=1, b=1, w=1, link=3, latency=0.5)
    result = simulate(compile(two_ranks(2), ahead=10), costs)
    # Activations leave at 1 and 2, hold the link 1-4 and 4-7, arrive at 4.5 and 7.5. Rank 1: F 4.5, I 5.5, W 6.5, F 7.5, I 8.5.
    sends = [(s.start, s.end, s.kind) for s in result.spans if s.rank == 0 and s.queue == "send"]
    assert sends == [(1, 4, "activation"), (4, 7, "activation")]
    rank1 = [(s.what, s.start) for s in result.spans if s.rank == 1 and s.queue == "compute"]
    assert rank1 == [("1F0", 4.5), ("1I0", 5.5), ("1W0", 6.5), ("1F1", 7.5), ("1I1", 8.5), ("1W1", 9.5)]
    # Gradients: out at 6.5 and 9.5, here at 10 and 13. Rank 0 idles 2-10, of which 2-6.5 the gradient was not computed yet.
    assert result.exposed_comm == pytest.approx((10 - 6.5 + 13 - 12, 4.5 - 1))
    assert result.makespan == 15
    assert result.bubble == pytest.approx(15 - 6)


def test_a_message_waits_for_its_receive() -> None:
    """One receive ahead: the second activation starts when rank 1 gets to the first, not when it is sent."""
    late, early = (simulate(compile(two_ranks(6), ahead=ahead), Costs(f=1, b=1, w=1, link=2.5)) for ahead in (1, 10))
    starts = [[s.start for s in r.spans if s.rank == 1 and s.queue == "recv"] for r in (late, early)]
    assert starts[1] == [1.0 + 2.5 * k for k in range(6)]
    assert all(a >= b for a, b in zip(*starts)) and starts[0] != starts[1]


def test_recompute_hides_behind_the_gradient() -> None:
    costs = Costs(f=1, b=1, w=1, r=0.5, link=3)
    program = compile(two_ranks(1), recompute=True)
    result = simulate(program, costs)
    # Rank 0: F until 1, R 1-1.5, its gradient arrives at 1+3+1+0.5+1+3 = 9.5. Rank 1 has all it needs after its own forward.
    assert result.hidden_recompute == (0.5, 0.0)
    assert result.makespan == 9.5 + 2


def test_high_priority_queue_runs_beside_compute() -> None:
    """The last piece of F frees the compute queue, and delays only its own message."""
    costs = Costs(f=1, b=1, w=1, high=0.25)
    result = simulate(compile(two_ranks(3), high=True), costs)
    forwards = [(s.start, s.end) for s in result.spans if s.rank == 0 and s.kind == "F" and s.queue == "compute"]
    assert forwards == [(0, 0.75), (0.75, 1.5), (1.5, 2.25)]
    tails = [(s.start, s.end) for s in result.spans if s.rank == 0 and s.kind == "F" and s.queue == "high"]
    assert tails == [(0.75, 1.0), (1.5, 1.75), (2.25, 2.5)]
    assert next(s.start for s in result.spans if s.rank == 0 and s.queue == "send") == 1.0
    assert result.makespan <= simulate(compile(two_ranks(3)), costs).makespan


def test_memory_counts_from_forward_to_weight_gradient() -> None:
    row = tuple(parse(f"0{text}") for text in ["F0", "F1", "I0", "F2", "W0", "I1", "W1", "I2", "W2"])
    schedule = Schedule("one", linear(1), 3, (row,))
    result = simulate(schedule, Costs(activation_bytes=10, microbatch_weights=(1, 2, 4)))
    assert result.peak_live == (3,)
    assert result.peak_bytes == (70,)
    assert result.makespan == 3 * 7
    forward = simulate(build("1f1b", 2, 5, forward=True), Costs(activation_bytes=10))
    assert forward.peak_live == (1, 1) and forward.peak_bytes == (10, 10) and forward.makespan == 6


def test_pairs_share_their_time() -> None:
    schedule, costs = build("dualpipe", 4, 8), Costs(f=1, b=1, w=1, pair=2.4)
    result = simulate(schedule, costs)
    for span in result.spans:
        if span.queue == "compute":
            assert span.end - span.start == pytest.approx((0.8 if span.pair is not None else 1.0) * (2 if span.kind == "B" else 1))
    assert any(span.pair is not None for span in result.spans)
    assert result.makespan < simulate(schedule, Costs(f=1, b=1, w=1)).makespan


def test_weights_follow_the_model() -> None:
    """One profile of the model, for placements of any number of stages."""
    costs = Costs(weights=(1.0, 3.0))
    assert costs.stage_factors(linear(2)) == ((1.0, 3.0),)
    assert costs.stage_factors(vee(2)) == ((0.5, 0.5, 1.5, 1.5),)
    assert costs.stage_factors(linear(1)) == ((2.0,),)
    assert Costs(weights=((1.0, 3.0), (2.0, 2.0))).stage_factors(bidirectional(2)) == ((1.0, 3.0), (2.0, 2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f": -1.0}, "costs.f = -1.0"),
        ({"link": float("nan")}, "costs.link"),
        ({"f": 0.0, "b": 0.0, "w": 0.0}, "at least one"),
        ({"high": 2.0}, "costs.high = 2.0"),
        ({"weights": ()}, "costs.weights"),
        ({"weights": (1.0, 0.0)}, "costs.weights"),
        ({"microbatch_weights": (1.0, -1.0)}, "costs.microbatch_weights"),
    ],
)
def test_costs_refuse(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Costs(**arguments)


def test_costs_that_do_not_fit_the_schedule() -> None:
    with pytest.raises(ValueError, match="3 factors for 4 micro-batches"):
        simulate(build("1f1b", 2, 4), Costs(microbatch_weights=(1, 1, 1)))
    with pytest.raises(ValueError, match="2 lanes"):
        simulate(build("1f1b", 2, 4), Costs(weights=((1.0,), (1.0,))))


def all_schedules(placement: Placement, microbatches: int) -> list[Schedule]:
    """Every combination of rows in which each stage takes its micro-batches in order."""

    def orders(rank: int) -> list[tuple[Action, ...]]:
        queues = [
            [Action(kind, stage, m, lane) for m in lane_microbatches(microbatches, placement.lanes, lane)]  # type: ignore[arg-type]
            for lane, stage in placement.held(rank)
            for kind in "FIW"
        ]

        def merge(at: tuple[int, ...]) -> list[tuple[Action, ...]]:
            if all(i == len(q) for i, q in zip(at, queues)):
                return [()]
            found = []
            for j, queue in enumerate(queues):
                # F before I before W of the same micro-batch
                if at[j] < len(queue) and (j % 3 == 0 or at[j] < at[j - 1]):
                    rest = merge((*at[:j], at[j] + 1, *at[j + 1 :]))
                    found += [(queue[at[j]], *tail) for tail in rest]
            return found

        return merge((0,) * len(queues))

    rows = [orders(rank) for rank in range(placement.ranks)]
    return [Schedule("all", placement, microbatches, combination) for combination in product(*rows)]


def runs(schedule: Schedule) -> bool:
    done: set[Action] = set()
    at = [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.rows):
            while at[rank] < len(row):
                kind, stage, m, lane = row[at[rank]]
                needs = None
                if kind == "F" and stage:
                    needs = Action("F", stage - 1, m, lane)
                elif kind == "I":
                    last = stage + 1 == schedule.placement.stages
                    needs = Action("F", stage, m, lane) if last else Action("I", stage + 1, m, lane)
                if needs is not None and needs not in done:
                    break
                done.add(row[at[rank]])
                at[rank] += 1
                moved = True
    return all(i == len(row) for i, row in zip(at, schedule.rows))


@pytest.mark.parametrize("placement", [linear(2), bidirectional(2), vee(1)], ids=["linear", "bidirectional", "v"])
@pytest.mark.parametrize("seed", range(4))
def test_lower_bounds_hold_for_every_schedule(placement: Placement, seed: int) -> None:
    """Against the best of all schedules, found by trying them, with and without a cap."""
    random = Random(seed)
    costs = Costs(*(random.uniform(0.2, 3) for _ in range(3)), link=random.uniform(0, 2), latency=random.uniform(0, 1))
    microbatches = 2
    best: dict[float, float] = {}
    for schedule in all_schedules(placement, microbatches):
        if not runs(schedule):
            continue
        peak = 0.0
        for row in schedule.rows:
            live = 0
            for action in row:
                live += {"F": 1, "I": 0, "W": -1}[action.kind]
                peak = max(peak, live * placement.share)
        best[peak] = min(best.get(peak, float("inf")), oracle(schedule, costs))
    for cap in sorted(best):
        optimum = min(makespan for peak, makespan in best.items() if peak <= cap)
        assert lower_bound(placement, microbatches, costs, max_live=cap) <= optimum + 1e-9
    assert lower_bound(placement, microbatches, costs) <= min(best.values()) + 1e-9
