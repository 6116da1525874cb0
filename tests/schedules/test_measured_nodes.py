"""Costs of nodes from a recorded step: a simulated step taken for a recorded one gives back the costs that it was made with."""

import random

import pytest
from test_simulate_nodes import TIMES, costs, stage

from pipehc.schedules import Costs, build, compile, simulate
from pipehc.schedules.measured_nodes import measured_node_costs
from pipehc.schedules.recording import Recording


def recorded(schedule, given, recompute=False):
    result = simulate(compile(schedule, high=True, recompute=recompute), given)
    return Recording("a step", schedule, recompute, result.spans), result.makespan


@pytest.mark.parametrize("one_worker", [True, False])
@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "1f1b", "zb_h1", "zbv", "interleaved", "gpipe"])
def test_gives_back_what_a_step_was_made_of(name, one_worker):
    schedule = build(name, 4, 8)
    rng = random.Random(name)
    nodes = {}
    for s in range(schedule.placement.stages):
        own = {key: ms * rng.uniform(0.5, 2) for key, ms in TIMES.items()}
        nodes |= {(s, kind): rows for kind, rows in stage(own, 2).items()}
    given = Costs(nodes=nodes, link=0.5, one_worker=one_worker)
    recording, makespan = recorded(schedule, given)
    found = measured_node_costs(recording, one_worker=one_worker)
    assert found.link == pytest.approx(0.5) and found.one_worker == one_worker
    for key, rows in given.nodes:
        got = dict(found.nodes)[key]
        if key[1] != "W" or "dualpipe" in name:
            assert [row[:2] for row in got] == [row[:2] for row in rows]
            alone = [row.ms for row in rows]
            assert [row.ms for row in got] == pytest.approx(alone, rel=0.02 if one_worker else 0.2), key
        assert sum(row.ms for row in got) == pytest.approx(sum(row.ms for row in rows), rel=0.02 if one_worker else 0.2)
    again = simulate(compile(schedule, high=True), found).makespan
    assert again == pytest.approx(makespan, rel=0.01 if one_worker else 0.1)


def test_recomputation_is_an_action_of_its_own():
    given = Costs(nodes=costs(TIMES, stages=2).nodes, table={(s, "R"): 1.5 + s for s in range(2)}, one_worker=True)
    recording, makespan = recorded(build("dualpipe", 2, 6), given, recompute=True)
    found = measured_node_costs(recording, one_worker=True)
    assert [found.time("R", s) for s in range(2)] == pytest.approx([1.5, 2.5])
    assert simulate(recording.program(), found).makespan == pytest.approx(makespan, rel=0.01)


def test_pairs_that_were_not_interleaved_stay_that():
    """Then the simulator must run them one half after the other: costs of whole actions."""
    schedule = build("dualpipe", 4, 8)
    given = costs(TIMES, stages=4, one_worker=True)
    whole = Costs(table={(s, kind): given.time(kind if kind != "B" else "I", s) for s in range(4) for kind in "FBW"})
    spans = simulate(schedule, whole).spans
    nodes = []
    for span in spans:
        if span.queue == "compute" and span.kind in "FBI":
            at, names = span.start, stage(TIMES)["F" if span.kind == "F" else "B"]
            for name, queue, ms in names:
                what = f"{'F' if span.kind == 'F' else 'B'}{span.microbatch} {name}"
                on = "high" if queue == "high" else "node"
                nodes.append(span._replace(queue=on, start=at, end=at + ms, what=what, kind=what[0], pair=None))
                at += ms
    recording = Recording("a step", schedule, False, (*spans, *nodes))
    found = measured_node_costs(recording, one_worker=True)
    assert not found.nodes
    assert simulate(schedule, found).makespan == pytest.approx(simulate(schedule, whole).makespan)


def test_needs_spans_of_nodes():
    schedule = build("1f1b", 2, 4)
    recording = Recording("step 3", schedule, False, simulate(schedule, Costs()).spans)
    with pytest.raises(ValueError, match="step 3: has no spans of nodes"):
        measured_node_costs(recording, one_worker=True)
