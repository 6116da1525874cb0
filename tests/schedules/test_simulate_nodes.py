"""Simulation node by node: pairs worked out by hand, messages that leave on the way, queues, and bounds that hold."""

import random
from itertools import pairwise

import pytest
from random_schedules import random_family, random_schedule

from pipehc.schedules import Action, Costs, Pair, Schedule, build, compile, simulate
from pipehc.schedules.bounds import lower_bound
from pipehc.schedules.pair_order import NODE_KINDS, pair_order
from pipehc.schedules.pair_time import pair_times, steps_of, uncovered
from pipehc.schedules.placement import linear

QUEUES = {"dispatch": "communication", "combine": "communication", "mlp_post": "high"}


def stage(times, blocks=1):
    """Nodes of F, B and W with the times of (what, kind)."""
    order = [(block, kind) for block in range(blocks) for kind in NODE_KINDS]

    def rows(what, order):
        found = [(f"{block}.{kind}", QUEUES.get(kind, "compute"), times.get((what, kind))) for block, kind in order]
        return [row for row in found if row[2] is not None]

    return {"F": rows("F", order), "B": rows("B", order[::-1]), "W": rows("W", order[::-1])}


def costs(times, stages=1, blocks=1, **more):
    return Costs(nodes={(s, kind): rows for s in range(stages) for kind, rows in stage(times, blocks).items()}, **more)


TIMES = {(what, kind): ms for what in "FB" for kind, ms in zip(NODE_KINDS, (4.0, 3.0, 6.0, 3.0, 1.0))}
TIMES |= {("W", "mlp"): 5.0, ("W", "attention"): 2.0}
# One rank: F of micro-batch 0, then F of 1 with B of 0, then B of 1.
ONE_PAIR = Schedule(
    "pair", linear(1), 2, ((Action("F", 0, 0), Pair(Action("F", 0, 1), Action("B", 0, 0)), Action("B", 0, 1)),)
)


def starts(result, queue="node"):
    return {s.what: s.start for s in result.spans if s.queue == queue}


def test_a_pair_by_hand():
    result = simulate(ONE_PAIR, costs(TIMES))
    expected = {
        "F0 0.attention": 0, "F0 0.dispatch": 4, "F0 0.mlp": 7, "F0 0.combine": 13,
        "B0 0.combine": 18, "F1 0.attention": 17, "F1 0.dispatch": 21, "B0 0.mlp": 21, "B0 0.dispatch": 27,
        "F1 0.mlp": 27, "F1 0.combine": 33, "W0 0.mlp": 33, "B0 0.attention": 38, "W0 0.attention": 42,
        "B1 0.combine": 45, "B1 0.mlp": 48, "B1 0.dispatch": 54, "B1 0.attention": 57,
    }  # fmt: skip
    assert starts(result) == expected
    assert starts(result, "high") == {"F0 0.mlp_post": 16, "B0 0.mlp_post": 17, "F1 0.mlp_post": 36, "B1 0.mlp_post": 44}
    assert result.makespan == 68
    assert result.all_to_all == (24,) and result.exposed_all_to_all == (12,)  # those of F0 and of B1
    assert result.high_delay == (0,) and result.bubble == 0
    actions = [(s.what, s.start, s.end) for s in result.spans if s.queue == "compute"]
    assert actions == [("0F0", 0, 17), ("0F1", 17, 38), ("0B0", 38, 44), ("0B1", 44, 68)]


def test_the_same_pair_on_one_worker():
    """The high-priority work is done in its place by the compute queue, here a while after it could be."""
    result = simulate(ONE_PAIR, costs(TIMES, one_worker=True))
    assert starts(result)["F1 0.combine"] == 34 and starts(result, "high")["F1 0.mlp_post"] == 39
    assert result.makespan == 70 and result.high_delay == (2,)
    assert result.exposed_all_to_all == (12,)


def test_transfers_of_one_worker_are_beside_each_other():
    """On the in-order queue of a device the second all-to-all waits for the first."""
    times = {("F", "attention"): 1.0, ("F", "dispatch"): 9.0, ("F", "mlp"): 1.0, ("F", "combine"): 0.0}
    times |= {("B", "combine"): 9.0, ("B", "mlp"): 1.0}
    whole = [pair_times(steps_of(costs(times, one_worker=one), 0, 0), one).whole for one in (False, True)]
    # Combine B 0-9; dispatch F after attention: 9-18 or 1-10; then mlp F.
    assert whole == [19, 11]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_pair_alone_is_the_pair_in_a_step(blocks):
    given = costs(TIMES, blocks=blocks)
    result = simulate(ONE_PAIR, given)
    spans = [s for s in result.spans if s.queue == "compute" and s.pair is not None]
    alone = pair_times(steps_of(given, 0, 0))
    assert max(s.end for s in spans) - min(s.start for s in spans) == pytest.approx(alone.whole)
    assert alone.compute == pytest.approx(blocks * (4 + 6 + 4 + 6 + 7))  # the ends of the FFNs are beside it
    assert alone.all_to_all == pytest.approx(12 * blocks)


def test_nodes_are_issued_in_the_order_of_the_runtime():
    """Spans of each queue, in their order in time, are the turns of `pair_order` on that queue."""
    result = simulate(ONE_PAIR, costs(TIMES, blocks=2))
    names = [row[0] for row in stage(TIMES, 2)["F"]]
    turns = [turn for turn in pair_order(names, names) if not isinstance(turn, str)]
    pair = {"F1", "B0", "W0"}
    for kinds in (("attention", "mlp"), ("dispatch", "combine"), ("mlp_post",)):
        found = [s.what for s in sorted(result.spans, key=lambda s: s.start) if s.what[:2] in pair and s.what.endswith(kinds)]
        assert found == [f"{w}{int(w == 'F')} {n}" for w, n in turns if n.endswith(kinds) and (w != "W" or n.endswith(kinds))]


def test_actions_alone_wait_for_their_all_to_alls():
    result = simulate(build("1f1b", 2, 4), costs(TIMES, stages=2))
    whole = simulate(build("1f1b", 2, 4), Costs(table={(s, kind): ms for s in (0, 1) for kind, ms in zip("FBW", (17, 17, 7))}))
    assert result.makespan == pytest.approx(whole.makespan)
    assert result.all_to_all == result.exposed_all_to_all == (4 * 12, 4 * 12)
    assert result.busy == pytest.approx(whole.busy)


def test_messages_of_a_pair_leave_when_their_nodes_end():
    """The output after the last mlp_post, the gradient after the last attention B and before the W that follows."""
    program = compile(build("dualpipe", 4, 10), high=True)
    result = simulate(program, costs(TIMES, stages=4, blocks=2))
    nodes = {(s.rank, s.what): s for s in result.spans if s.queue in ("node", "high")}
    sent = {(s.rank, s.kind, s.stage, s.microbatch): s.start for s in result.spans if s.queue == "send"}
    pairs = [s for s in result.spans if s.queue == "compute" and s.pair is not None]
    checked = 0
    for span in pairs:
        rank, m = span.rank, span.microbatch
        if (at := sent.get((rank, "activation", span.stage + 1, m))) is not None and span.kind == "F":
            assert at == pytest.approx(nodes[rank, f"F{m} 1.mlp_post"].end)
            checked += 1
        if (at := sent.get((rank, "gradient", span.stage - 1, m))) is not None and span.kind == "I":
            assert nodes[rank, f"B{m} 0.attention"].end <= at + 1e-9
            assert at <= nodes[rank, f"W{m} 0.attention"].start + 1e-9
            checked += 1
    assert checked > 20


def test_a_late_message_is_exposed_once():
    """What a pair waits for in its middle is no work, and no bubble."""
    for link in (0.0, 30.0):
        result = simulate(compile(build("dualpipe", 4, 10), high=True), costs(TIMES, stages=4, link=link))
        for rank, busy in enumerate(result.busy):
            assert busy + result.exposed_comm[rank] <= result.makespan + 1e-9
            spans = sorted((s.start, s.end) for s in result.spans if s.rank == rank and s.queue == "compute")
            assert all(one[1] <= other[0] + 1e-9 for one, other in pairwise(spans))
        assert (max(result.exposed_comm) > 0) == (link > 0)


def test_dense_and_uneven_stages():
    """Stage 0 has one dense block, stage 1 three blocks with experts: pairs of both on either rank."""
    dense = {key: ms for key, ms in TIMES.items() if key[1] not in ("dispatch", "combine")}
    nodes = {(0, kind): rows for kind, rows in stage(dense).items()} | {(1, kind): rows for kind, rows in stage(TIMES, 3).items()}
    result = simulate(compile(build("dualpipe", 2, 6), high=True), Costs(nodes=nodes))
    assert result.all_to_all == pytest.approx((3 * 3 * 12, 3 * 3 * 12))
    assert 0 < result.exposed_all_to_all[0] < result.all_to_all[0]
    for rank in range(2):
        works = [s for s in result.spans if s.rank == rank and s.queue == "node" and s.what.endswith(("attention", "mlp"))]
        assert len({s.what for s in works}) == len(works)


def random_costs(rng, stages):
    nodes = {}
    for s in range(stages):
        times = {(what, kind): rng.choice([0.0, rng.uniform(0, 5)]) for what in "FB" for kind in NODE_KINDS}
        times |= {("W", kind): rng.uniform(0, 4) for kind in ("attention", "mlp")}
        if rng.random() < 0.3:
            times = {key: ms for key, ms in times.items() if QUEUES.get(key[1]) != "communication"}
        times["F", "attention"] = times["B", "attention"] = rng.uniform(0.1, 4)
        nodes |= {(s, kind): rows for kind, rows in stage(times, rng.randint(1, 3)).items()}
    link, latency = (rng.choice([0.0, rng.uniform(0, 5)]) for _ in range(2))
    again = {(s, "R"): rng.uniform(0, 2) for s in range(stages)}
    return Costs(nodes=nodes, table=again, link=link, latency=latency, one_worker=rng.random() < 0.3)


@pytest.mark.parametrize("seed", range(60))
def test_bounds_hold_and_nothing_overlaps(seed):
    rng = random.Random(seed)
    schedule = random_schedule(rng, rng.randint(1, 4)) if seed % 2 else random_family(rng, rng.choice([2, 4]))
    given = random_costs(rng, schedule.placement.stages)
    result = simulate(compile(schedule, high=rng.random() < 0.7, recompute=rng.random() < 0.3), given)
    assert result.lower_bound <= result.makespan + 1e-9
    bound = lower_bound(schedule.placement, schedule.microbatches, given, max_live=max(result.peak_live))
    assert result.lower_bound - 1e-9 <= bound <= result.makespan + 1e-9
    for rank in range(schedule.ranks):
        moves, works = [], []
        for span in result.spans:
            if span.rank == rank and span.queue in ("node", "high"):
                (moves if span.what.endswith(("dispatch", "combine")) else works).append((span.start, span.end))
        assert result.all_to_all[rank] == pytest.approx(uncovered(moves))
        assert 0 <= result.exposed_all_to_all[rank] <= result.all_to_all[rank] + 1e-9
        assert result.busy[rank] <= result.makespan + 1e-9
    assert min(result.high_delay) >= 0


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_with_a_queue_of_high_priority(seed):
    """It runs beside the compute queue: of the rank's time an action takes less."""
    rng = random.Random(seed)
    schedule = random_schedule(rng, rng.randint(1, 3))
    given = Costs(f=rng.uniform(0.5, 2), b=rng.uniform(0.5, 2), w=rng.uniform(0, 1), high=rng.uniform(0, 0.5))
    result = simulate(compile(schedule, high=True), given)
    assert result.lower_bound <= result.makespan + 1e-9
