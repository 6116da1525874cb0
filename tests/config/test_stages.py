"""Blocks to stages, stages to ranks."""

from itertools import chain
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipehc.config.schema import ScheduleConfig, SearchConfig
from pipehc.config.stages import assign_blocks, build_schedule, placement_of
from pipehc.schedules import check


@given(st.integers(1, 64).flatmap(lambda stages: st.tuples(st.integers(stages, 200), st.just(stages))))
def test_even_without_gaps_and_light_at_the_ends(case: tuple[int, int]) -> None:
    blocks, stages = case
    assigned = assign_blocks(blocks, stages)
    sizes = [len(part) for part in assigned]
    assert list(chain(*assigned)) == list(range(blocks))
    assert len(sizes) == stages and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    if stages > 2:
        assert max(sizes[0], sizes[-1]) <= min(sizes[1:-1])
    assert sizes[-1] == min(sizes)  # the output head costs more than the embedding


@pytest.mark.parametrize(
    ("blocks", "stages", "sizes"),
    [
        (30, 8, [3, 4, 4, 4, 4, 4, 4, 3]),
        (18, 4, [4, 5, 5, 4]),
        (7, 4, [2, 2, 2, 1]),
        (5, 2, [3, 2]),
        (9, 4, [2, 2, 3, 2]),
        (3, 1, [3]),
    ],
)
def test_sizes(blocks: int, stages: int, sizes: list[int]) -> None:
    assert [len(part) for part in assign_blocks(blocks, stages)] == sizes


def test_explicit() -> None:
    assert assign_blocks(8, 3, [1, 5, 2]) == [range(1), range(1, 6), range(6, 8)]
    assert assign_blocks(8, 2, (3, 5)) == [range(3), range(3, 8)]


@pytest.mark.parametrize(
    ("blocks", "stages", "explicit", "words"),
    [
        (3, 4, None, ["blocks = 3", "4 stages", "at least one"]),
        (3, 0, None, ["0 stages"]),
        (8, 3, [4, 4], ["[4, 4]", "2 numbers", "3, one a stage"]),
        (8, 2, [4, 5], ["[4, 5]", "sums to 9", "blocks = 8"]),
        (8, 3, [4, 0, 4], ["[4, 0, 4]", "at least one"]),
    ],
)
def test_refused(blocks: int, stages: int, explicit: list[int] | None, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        assign_blocks(blocks, stages, explicit)
    for word in words:
        assert word in str(caught.value)


def config(name: str, chunks: int | None = None, **search: object) -> SimpleNamespace:
    return SimpleNamespace(schedule=ScheduleConfig(name=name, chunks=chunks), search=SearchConfig(**search))


def held(ranks: int, *args: object, **search: object) -> list[list[int]]:
    placement = placement_of(config(*args, **search), ranks)
    return [sorted(stage for _, stage in placement.held(rank)) for rank in range(ranks)]


def test_placements_of_the_schedules() -> None:
    assert held(4, "1f1b") == held(4, "gpipe") == held(4, "zb_h1") == [[0], [1], [2], [3]]
    assert held(4, "dualpipe") == [[0, 3], [1, 2], [1, 2], [0, 3]]
    assert held(4, "dualpipev") == held(4, "zbv") == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert held(2, "interleaved") == [[0, 2], [1, 3]]
    assert held(2, "interleaved", 3) == [[0, 2, 4], [1, 3, 5]]
    for placement, same in (("linear", "1f1b"), ("v", "zbv"), ("bidirectional", "dualpipe")):
        assert held(4, "auto", placement=placement) == held(4, same)


def test_searched_schedules_and_their_evaluation_share_a_placement() -> None:
    searched = config("auto", placement="bidirectional", link=0.2, max_live=3.0, time_limit=0.3)
    train, evaluation = build_schedule(searched, 4, 12), build_schedule(searched, 4, 6, forward=True)
    assert train.placement == evaluation.placement == placement_of(searched, 4)
    assert evaluation.forward_only and max(check(train).peak_live) <= 3
    with pytest.raises(ValueError, match=r"max_live = 1\.5"):
        build_schedule(config("auto", placement="bidirectional", max_live=1.5), 4, 12)
