"""What runs away is told in words, once, before the loss shows it."""

import math

import pytest

from pipehc.watch.stream_warnings import PATIENCE, StreamWarnings, summary


def figures(depth=4, *, gain=1.5, similarity=0.5, **changes):
    composite = {"forward": [gain - k * (gain - 1) / depth for k in range(depth)], "backward": [1.2] * depth}
    return {
        "stream_norm": [[1.0, 2.0]] * (depth + 1),
        "gradient": [3.0, 2.0, 2.0, 1.0, 1.0],
        "composite": composite,
        "distance": {"rows": [1e-6] * depth, "columns": [0.01] * depth, "orthogonality": [0.1] * depth},
        "h_pre_norm": [0.5] * depth,
        "similarity": [similarity] * (depth + 1),
    } | changes


def test_nothing_to_tell():
    warnings = StreamWarnings(20.0)
    assert [warnings.look(figures()) for _ in range(3 * PATIENCE)] == [[]] * 3 * PATIENCE


def test_a_gain_that_grows_is_told_once_and_when_it_has_doubled():
    warnings = StreamWarnings(20.0)
    told = [warnings.look(figures(gain=gain)) for gain in (5, 19.9, 20.1, 25, 39, 50, 3, 21)]
    assert [len(each) for each in told] == [0, 0, 1, 0, 0, 1, 0, 1]
    assert "signals grow up to 20.1 times" in told[2][0] and "from sub-layer 0 to the end" in told[2][0]
    assert "diagnostics.gain_bound = 20" in told[2][0]


def test_both_ways_are_told_apart():
    changed = figures(composite={"forward": [1.0] * 4, "backward": [1.0, 2.0, 99.0, 1.0]})
    (text,) = StreamWarnings(20.0).look(changed)
    assert text.startswith("gradients grow up to 99 times") and "from sub-layer 2 to the end" in text


def test_streams_that_come_together_and_such_as_never_were_apart():
    warnings = StreamWarnings(20.0)
    assert not warnings.look(figures(similarity=0.7))
    (text,) = warnings.look(figures(similarity=0.995))
    assert "have become all but copies" in text and "0.9950" in text
    warnings = StreamWarnings(20.0)
    told = [warnings.look(figures(similarity=1.0)) for _ in range(PATIENCE + 5)]
    assert [len(each) for each in told] == [0] * (PATIENCE - 1) + [1] + [0] * 5 and "are still all but copies" in told[
        PATIENCE - 1
    ][0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"gradient": [5000.0, 2.0, 2.0, 1.0, 3.0]}, "5e+03 times as large before sub-layer 0 as before sub-layer 3"),
        ({"gradient": [1.0, math.nan, 1.0, 1.0, 1.0]}, "is no number before sub-layer 1"),
        ({"gradient": [math.nan, math.nan, 1.0, 1.0, 1.0]}, "is no number before sub-layer 0"),
        ({"gradient": [math.inf] * 5}, "is no number before sub-layer 0"),
        ({"gradient": [None, None, 1.0, 1.0, 1.0]}, "is no number before sub-layer 0"),  # as it stands in the file
        ({"gradient": [0.0, 1.0, 2.0, 1.0, 4e4]}, "4e+04 times as large at the end as before sub-layer 1"),  # a frozen embedding
        ({"similarity": math.nan}, "a stream or a map holds what is no number"),
        ({"h_pre_norm": [0.5, math.nan, 0.5, 0.5]}, "a stream or a map holds what is no number"),
        ({"stream_norm": [[1.0, math.inf]] * 5}, "a stream or a map holds what is no number"),
        ({"h_pre_norm": [0.5, 0.5, 1e-5, 0.5]}, "sub-layer 2 reads next to nothing: the norm of its H_pre is 1.0e-05"),
    ],
)
def test_what_else_goes_wrong(changes, words):
    (text,) = StreamWarnings(20.0).look(figures(**changes))
    assert words in text


def test_the_plain_residual_has_norms_alone():
    plain = {"stream_norm": [[1.0]] * 3, "gradient": [2.0, 1.0, 1.0]}
    assert summary(plain) == {"gradient_spread": 2.0, "stream_norm": 1.0}
    assert StreamWarnings(20.0).look(plain) == []


def test_summary():
    one = summary(figures(gain=7.0, similarity=0.25))
    assert one["composite_forward"] == 7.0 and one["composite_backward"] == 1.2 and one["similarity"] == 0.25
    assert one["distance_columns"] == 0.01 and one["gradient_spread"] == 3.0 and one["stream_norm"] == 2.0
