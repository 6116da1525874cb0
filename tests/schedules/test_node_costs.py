"""Costs by stage and by node: one frozen form, and what is refused; search and drawings with them."""

import pickle
from dataclasses import replace

import pytest

from pipehc.schedules import Costs, auto_report, build, compile, simulate
from pipehc.schedules.draw import simulated

F = [("0.attention", "compute", 4.0), ("0.mlp", "compute", 6.0), ("0.mlp_post", "high", 1.0)]
B = [("0.mlp_post", "high", 1.0), ("0.mlp", "compute", 7.0), ("0.attention", "compute", 5.0)]
W = [("0.mlp", "compute", 3.0), ("0.attention", "compute", 2.0)]


def nodes(stages, **changed):
    return {(s, kind): changed.get(kind, rows) for s in range(stages) for kind, rows in (("F", F), ("B", B), ("W", W))}


def table(stages, **times):
    return {(s, kind): times.get(kind, 1.0) for s in range(stages) for kind in "FBWR"}


def test_are_frozen_hashable_and_picklable():
    one = Costs(table={(s, "R"): 1.0 for s in range(4)}, nodes=nodes(4), link=2.0)
    other = Costs(table={(s, "R"): 1 for s in reversed(range(4))}, nodes=dict(reversed(nodes(4).items())), link=2.0)
    assert one == other and hash(one) == hash(other) and repr(one) == repr(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert replace(one, link=3.0).nodes == one.nodes
    assert one.time("F", 2) == 11 and one.time("B", 2) == 18 and one.time("R", 2) == 1


def test_neighbours_of_one_node_and_queue_are_one():
    parts = [("0.attention", "compute", 1.0), ("0.attention", "compute", 3.0), *F[1:]]
    assert Costs(nodes=nodes(2, F=parts)) == Costs(nodes=nodes(2))


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zbv", "dualpipe", "dualpipev", "gpipe", "interleaved"])
def test_a_table_of_equal_stages_is_the_same_as_numbers(name):
    schedule = build(name, 4, 8)
    share = schedule.placement.share
    numbers = Costs(f=3, b=4, w=2, r=1, link=0.5, latency=0.25, activation_bytes=8)
    times = table(schedule.placement.stages, F=3 * share, B=4 * share, W=2 * share, R=share)
    by_stage = Costs(table=times, link=0.5, latency=0.25, activation_bytes=8)
    one, other = (simulate(compile(schedule, recompute=True), costs) for costs in (numbers, by_stage))
    assert one == other


def test_every_stage_takes_its_own_time():
    schedule = build("1f1b", 3, 5)
    costs = Costs(table={(s, kind): 10 * s + i + 1.0 for s in range(3) for i, kind in enumerate("FBW")})
    for span in simulate(compile(schedule, split_backward=False), costs).spans:
        if span.queue == "compute":
            expected = {"F": 1.0, "B": 5.0 + 10 * span.stage}[span.kind] + 10 * span.stage
            assert span.end - span.start == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": {(0, "X"): 1.0}}, r"costs.table\[\(0, 'X'\)\]: the key must be \(stage, kind\)"),
        ({"table": {(-1, "F"): 1.0}}, r"costs.table\[\(-1, 'F'\)\]"),
        ({"table": {"F": 1.0}}, r"costs.table\['F'\]"),
        ({"table": {(0, "F"): -1.0}}, r"costs.table\[0, 'F'\] = -1.0: must be a number >= 0"),
        ({"table": {(0, "F"): "soon"}}, r"costs.table\[0, 'F'\] = soon"),
        ({"table": {(0, "F"): float("nan")}}, r"costs.table\[0, 'F'\] = nan"),
        ({"table": {}}, "at least one time must be > 0"),
        ({"nodes": {(0, "I"): B}}, r"costs.nodes\[\(0, 'I'\)\]: the key"),
        ({"nodes": nodes(1, F=[("0.attention", "gpu", 1.0)])}, "'gpu' of 0.attention must be compute or high or communication"),
        ({"nodes": nodes(1, F=[("attention", "compute", 1.0)])}, "'attention' must be named BLOCK.KIND"),
        ({"nodes": nodes(1, F=[("0.router", "compute", 1.0)])}, "'0.router' must be named BLOCK.KIND, KIND one of attention"),
        ({"nodes": nodes(1, F=[("0.attention", 1.0)])}, r"\[0, 'F'\]: \('0.attention', 1.0\) must be \(name, queue, ms\)"),
        ({"nodes": nodes(1, F=[("0.attention", "compute", -2.0)])}, "ms of 0.attention = -2.0"),
        ({"nodes": nodes(1, W=[("0.mlp", "communication", 1.0)])}, "queue 'communication' of 0.mlp must be compute"),
        ({"nodes": nodes(1, F=F[::-1])}, r"costs.nodes\[0, 'F'\]: must have block after block"),
        ({"nodes": nodes(1, B=B[::-1])}, "in the order in which their backwards are issued, 0.mlp_post, 0.mlp, 0.attention"),
        ({"nodes": nodes(1, W=[("1.mlp", "compute", 1.0)])}, r"costs.nodes\[0, 'W'\]: '1.mlp' is no node of costs.nodes\[0, 'F'\]"),
        ({"nodes": nodes(1), "table": {(0, "B"): 12.0}}, r"costs.nodes\[0, 'B'\] add up to 13, but costs.table\[0, 'B'\] = 12"),
        ({"table": table(2), "weights": (1.0, 2.0)}, "costs.weights = .*: not with costs.table"),
        ({"table": table(2), "high": 0.5}, "costs.high = 0.5: not with"),
        ({"table": table(2), "pair": 2.0}, "costs.pair = 2.0: not with"),
        ({"nodes": nodes(2), "pair_leave": (0.5, 0.8)}, "costs.pair_leave = .*: not with"),
    ],
)
def test_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        Costs(**arguments)


@pytest.mark.parametrize("kind", "FBWR")
def test_what_is_missing_is_named(kind):
    schedule = compile(build("dualpipe", 4, 8), recompute=True)
    with pytest.raises(ValueError, match=rf"costs.table: no entry for \(2, '{kind}'\); it has stages 0, 1, 2, 3"):
        simulate(schedule, Costs(table={key: ms for key, ms in table(4).items() if key != (2, kind)}))


@pytest.mark.parametrize("kind", "FBW")
def test_nodes_that_are_missing_are_named(kind):
    some = {key: rows for key, rows in nodes(4).items() if key != (2, kind)}
    message = rf"costs.nodes: no entry for \(2, '{kind}'\)" if kind != "F" else r"costs.nodes\[2, 'B'\]: '0.mlp_post' is no node"
    with pytest.raises(ValueError, match=message):
        simulate(build("dualpipe", 4, 8), Costs(table=table(4, F=11, B=13, W=5), nodes=some))


def test_stages_must_be_those_of_the_placement():
    with pytest.raises(ValueError, match=r"no entry for \(4, 'F'\); it has stages 0, 1, 2, 3"):
        simulate(build("dualpipev", 4, 8), Costs(table=table(4)))
    with pytest.raises(ValueError, match=r"costs.table has \(4, 'B'\): the placement has stages 0..3"):
        simulate(build("dualpipe", 4, 8), Costs(table=table(8)))


def test_forward_only_needs_forwards_only():
    schedule = build("1f1b", 2, 3, forward=True)
    assert simulate(schedule, Costs(table={(0, "F"): 2.0, (1, "F"): 3.0})).makespan == 2 + 3 * 3
    costs = Costs(nodes={(s, "F"): F for s in (0, 1)})
    assert simulate(schedule, costs).makespan == 4 * 11
    assert simulate(compile(schedule, high=True), costs).busy == (3 * 10 + 1, 3 * 11)  # posts beside the next forward, or the loss


def test_auto_searches_with_them():
    costs = Costs(table={(s, kind): 1.0 + (s == 3) for s in range(4) for kind in "FBW"}, link=0.3)
    for given in (costs, Costs(nodes=nodes(4), link=0.3)):
        found = auto_report(4, 8, given, placements=("linear", "bidirectional"), time_limit=0.5)
        assert found.lower_bound <= found.makespan <= found.named_makespan
        assert simulate(found.schedule, given).makespan == pytest.approx(found.makespan)
    with pytest.raises(ValueError, match=r"for 4 stages: v on 4 ranks has 8; placements may be linear, bidirectional"):
        auto_report(4, 8, costs)
    with pytest.raises(ValueError, match=r"costs.table is for 3 stages: linear on 4 ranks has 4; no placement here has them"):
        auto_report(4, 8, Costs(table=table(3)), placements=("linear",))
    looped = auto_report(2, 4, Costs(table=table(4)), placements=("v", "looped"), time_limit=0.2)
    assert looped.schedule.placement.stages == 4


def test_drawings_have_rows_of_nodes():
    timeline = simulated(compile(build("dualpipe", 2, 4), high=True), Costs(nodes=nodes(2), link=1.0))
    assert [row.name for row in timeline.rows if row.rank == 0] == ["compute", "nodes", "high", "comm"]
    for summary in timeline.summaries:
        assert summary.idle >= -1e-9 and summary.busy > 0
