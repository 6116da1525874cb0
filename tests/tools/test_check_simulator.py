"""The check of the simulator against steps that ran, and the published pair beside ours."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
spec = importlib.util.spec_from_file_location("check_simulator", TOOLS / "check_simulator.py")
check_simulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_simulator)

from schedule_bench import published_pair  # noqa: E402
from schedule_bench.sleeping_nodes import Work  # noqa: E402

pytestmark = pytest.mark.timed


@pytest.mark.slow
def test_the_simulator_predicts_steps_that_ran():
    """Pairs included; 5 % on a quiet machine, and other work only makes recorded steps longer."""
    names = ["dualpipe", "dualpipev", "1f1b", "zb_h1"]
    checks = check_simulator.run(names, 4, 10, Work(), steps=3, realtime=True)
    errors = sorted(abs(check.error) for check in checks)
    assert errors[len(errors) // 2] < 0.1, [(check.name, check.error) for check in checks]
    for check in checks:
        hidden = sum(check.predicted.exposed_all_to_all) < 0.9 * sum(check.predicted.all_to_all)
        assert hidden == check.name.startswith("dualpipe")


def test_the_published_pair_is_divided_whole():
    """Whatever the division, compute and all-to-alls add up to what was published."""
    for division in (published_pair.BY_FLOPS, published_pair.Division(0.5, 2.0)):
        pair = published_pair.ours(division)
        assert pair.compute == pytest.approx(124.4) and pair.all_to_all == pytest.approx(113.0)
        assert pair.whole == pytest.approx(pair.compute + pair.exposed)
    fastest, slowest = published_pair.spread()
    assert fastest.whole <= published_pair.ours().whole <= slowest.whole


def test_prints_both_pairs(capsys):
    assert check_simulator.main(["--published"]) == 0
    shown = capsys.readouterr().out
    assert "DeepSeek, published profile" in shown and "129.0" in shown and "96.3 %" in shown
    assert shown.count("ours, simulated") == 3


def test_refuses_schedules_that_do_not_exist(capsys):
    assert check_simulator.main(["--schedules", "1f1b,foo"]) == 2
    assert "'foo'" in capsys.readouterr().err
