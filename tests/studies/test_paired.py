"""Differences by seed, and what counts as one."""

import pytest

from pipehc.studies.design import Row
from pipehc.studies.paired import cells, gap, judged, paired, spread, values, where


def rows(kind, losses):
    return [Row(f"{kind}-{seed}", {"kind": kind, "seed": seed}, {"loss": loss}) for seed, loss in enumerate(losses)]


def test_what_seeds_share_cancels():
    """Losses differ by 1 between seeds and by 0.01 between kinds: unpaired nothing could be said."""
    found = paired(rows("mhc", [1.99, 2.99, 3.98]), rows("none", [2.0, 3.0, 4.0]), "loss")
    assert found.mean == pytest.approx(-0.04 / 3)
    # By hand: deviations of (-0.01, -0.01, -0.02) are 0.005774; by root 3, and 4.303 times that.
    assert found.error == pytest.approx(0.0057735 / 3**0.5, rel=1e-4)
    assert found.half == pytest.approx(4.303 * 0.0057735 / 3**0.5, rel=1e-4)
    assert found.side == 0
    assert paired(rows("mhc", [1.99, 2.99, 3.99]), rows("none", [2.0, 3.0, 4.0]), "loss").side == -1


def test_pairs_are_of_one_seed_and_need_both():
    own = rows("mhc", [1.0, 2.0, None, 4.0])
    found = paired(own, rows("none", [0.5, None, 1.0, 3.0]), "loss")
    assert found.single == (0.5, 1.0)
    assert paired(own[:1], rows("none", [0.5]), "loss") is None  # one pair has no spread
    with pytest.raises(ValueError, match="mhc-0: another row has its seed 0"):
        paired(own + own, rows("none", [0.5, 0.5]), "loss")


def test_no_difference_at_all_is_none():
    assert gap([0.0, 0.0, 0.0]).side == 0
    assert gap([0.1, 0.1, 0.1]).side == 1


@pytest.mark.parametrize("count, quantile", [(2, 12.706), (5, 2.776), (31, 2.042), (40, 1.96)])
def test_quantiles_are_those_of_students_t(count, quantile):
    found = gap([0.0, 2.0] * (count // 2) + [1.0] * (count % 2))
    assert found.half == pytest.approx(quantile * found.error)


def test_spread_and_choice():
    every = rows("mhc", [1.0, None, 3.0]) + rows("hc", [5.0])
    assert cells(every, "kind") == [("mhc",), ("hc",)]
    assert spread(values(where(every, kind="mhc"), "loss")) == (2.0, pytest.approx(2**0.5), 1.0, 3.0, 2)
    assert spread([]) is None and spread([1.0]).deviation == 0.0


def test_verdicts():
    assert judged(gap([-0.1, -0.11, -0.12]), "x", -1, "p")[0] == "agrees"
    assert judged(gap([0.1, 0.11, 0.12]), "x", -1, "p")[0] == "differs"
    assert judged(gap([-0.1, 0.11, 0.0]), "x", -1, "p")[0] == "open"
    assert judged(None, "x", -1, "p")[0] == "open"
