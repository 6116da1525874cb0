"""Weight gradients that split backwards compute themselves: what actions then cost, and which parts are left to W."""

from dataclasses import replace

import pytest
from test_simulate_nodes import TIMES, costs

from pipehc.schedules import Costs, build, compile, simulate
from pipehc.schedules.bounds import lower_bound
from pipehc.schedules.deferral import at_once, parts_to_defer

STAGES = {"zb_h1": 4, "zbv": 8, "dualpipe": 4, "1f1b": 4}


def program(name, microbatches=12):
    return compile(build(name, 4, microbatches), high=True)


def test_what_is_computed_at_once_moves_from_w_to_i():
    given = costs(TIMES, stages=2, blocks=3)
    for parts, moved in ((None, 0), (("attention", "ffn"), 0), (("ffn",), 6), (("attention",), 15), ((), 21)):
        some = replace(given, at_once=at_once(parts))
        assert some.time("I", 1) == given.time("I", 1) and some.time("W", 1) == given.time("W", 1) - moved
        assert some.time("B", 1) == given.time("B", 1) and some.time("F", 1) == given.time("F", 1)
        assert some.least_work("I", 1) == given.least_work("I", 1) + moved
    with pytest.raises(ValueError, match=r"needs costs\.nodes"):
        Costs(at_once=("mlp",))


def test_each_runs_beside_the_all_to_all_after_its_own_node():
    schedule = build("zb_h1", 1, 1)
    found = simulate(compile(schedule, high=True), replace(costs(TIMES), at_once=("mlp",)))
    spans = {s.what: (s.start, s.end) for s in found.spans if s.queue == "node"}
    begin = spans["B0 0.mlp"][1]
    assert spans["B0 0.dispatch"] == (begin, begin + 3) and spans["W0 0.mlp"] == (begin, begin + 5)
    assert spans["B0 0.attention"][0] == begin + 5
    assert found.makespan == simulate(compile(schedule, high=True), costs(TIMES)).makespan - 3


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("parts", [(), ("attention",), ("ffn",)])
def test_bounds_hold(name, parts):
    some = replace(costs(TIMES, STAGES[name], blocks=2), at_once=at_once(parts))
    filled = program(name, 8)
    assert lower_bound(filled.schedule.placement, 8, some) <= simulate(filled, some).makespan + 1e-9


def test_those_parts_are_deferred_that_pay():
    """Experts' weight gradients hide all-to-alls, where there are any; those of attention, whatever is left, fill bubbles."""
    filled = program("zbv", 8)
    assert parts_to_defer(filled, costs(TIMES, 8)) == ("attention",)
    without = {**TIMES, **{(what, kind): 0.0 for what in "FB" for kind in ("dispatch", "combine")}}
    assert parts_to_defer(filled, costs(without, 8)) == ("attention", "ffn")
    assert parts_to_defer(filled, costs({**without, ("W", "attention"): 1e-6}, 8)) == ("ffn",)
    assert parts_to_defer(filled, costs({**without, ("W", "mlp"): 1e-6}, 8)) == ("attention",)
