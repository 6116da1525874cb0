"""The benchmark itself: its stages notice a scheduler that cheats, and its figures are those of what ran."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
spec = importlib.util.spec_from_file_location("bench_schedules", TOOLS / "bench_schedules.py")
bench_schedules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_schedules)

from schedule_bench import links, sleeping  # noqa: E402
from schedule_bench.sleeping import Chain, SleepingModule, SleepingStage, Work, loss  # noqa: E402

pytestmark = pytest.mark.timed

WORK = Work(f=0.02, b=0.03, w=0.01, bytes=64)


def chain(stages=2):
    return [Chain(WORK, index, stages) for index in range(stages)]


def timed(call, *arguments):
    start = time.monotonic()
    result = call(*arguments)
    return result, time.monotonic() - start


def test_stages_take_their_time_and_count_what_they_did():
    chains = chain()
    first, last = map(SleepingStage, chains)
    y, took = timed(first.forward, 5, None)
    assert took >= WORK.f and y.shape == (1, 16)
    assert last.forward(5, y) is None
    grad, took = timed(last.backward_input, 5, None)
    assert took >= WORK.b
    assert first.backward_input(5, grad) is None
    _, took = timed(first.backward_weight, 5)
    assert took >= WORK.w
    chains[0].check_step(1)
    with pytest.raises(RuntimeError, match=r"stage 1 did .*'W': 0"):
        chains[1].check_step(1)


def test_bookkeeping_is_part_of_the_time(monkeypatch):
    """Making a message takes a while here; the stage sleeps that much less."""
    slept, make = [], Work.message
    monkeypatch.setattr(Work, "message", lambda *a: (timed(sleep, 0.05), make(*a))[1])
    sleep = time.sleep
    stage = SleepingStage(Chain(Work(f=0.2, b=0, w=0, bytes=64), 0, 2))
    x = make(WORK, 0, 0)
    monkeypatch.setattr(sleeping.time, "sleep", slept.append)
    stage.forward(0, x)
    assert len(slept) == 1 and slept[0] <= 0.15


@pytest.mark.parametrize("deferred", [False, True])
def test_modules_do_the_same_under_autograd(deferred):
    later = []
    chains = chain()
    modules = [SleepingModule(c, (lambda fn: later.append(fn) or True) if deferred else None) for c in chains]
    y = modules[1](modules[0](WORK.message(3, 0).requires_grad_()))
    _, took = timed(loss(y).backward)
    assert took >= 2 * (WORK.b if deferred else WORK.b + WORK.w)
    assert all(c.done == {"F": 1, "I": 1, "W": 0 if deferred else 1} for c in chains)
    for weight_gradient in later:
        weight_gradient()
    for c in chains:
        c.check_step(1)


@pytest.mark.parametrize(
    "cheat",
    [
        lambda stage: stage.forward(0, WORK.message(0, 2)),  # a stage left out or run twice
        lambda stage: stage.backward_input(0, WORK.message(1, 0)),  # the gradient of another micro-batch
        lambda stage: stage.backward_input(0, torch.zeros(1, 16) + 7),  # nonsense
    ],
)
def test_a_scheduler_that_mixes_things_up_fails(cheat):
    with pytest.raises(RuntimeError, match=r"stage 1: (input|gradient) of"):
        cheat(SleepingStage(chain()[1]))


def run(tmp_path, *arguments):
    file = tmp_path / "figures.json"
    assert bench_schedules.main([*arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_times_ours_and_a_rival_side_by_side(tmp_path, capsys):
    sizes = ["--ranks=2", "--microbatches=4", "--f=40", "--b=40", "--w=40", "--rounds=2", "--bytes=4096"]
    (result,) = run(tmp_path, "--schedulers", "dualpipe,torch-1f1b,deepseek-dualpipe", *sizes)
    rows = {row["name"]: row for row in result["schedulers"]}
    assert set(rows) == {"dualpipe", "torch-1f1b"}
    assert all(len(row["steps"]) == 2 for row in rows.values())
    # Four micro-batches of 120 ms are 480 ms of work for a rank, whoever schedules it. A step can be shorter than its theory,
    # which contains the time of a message as measured beforehand.
    assert all(row["theory"] >= 480 and min(row["steps"]) >= 480 for row in rows.values())
    assert rows["dualpipe"]["theory"] < rows["torch-1f1b"]["theory"]
    said = capsys.readouterr()
    assert "deepseek-dualpipe: skipped, needs --dualpipe-source" in said.err
    assert "torch-1f1b" in said.out and "2 ranks, 4 micro-batches" in said.out


def test_links_are_skipped_with_a_word_where_they_cannot_be_limited(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(links.os, "geteuid", lambda: 1000)
    assert run(tmp_path, "--schedulers", "1f1b", "--link-ms", "15") == []
    assert "links of 15 ms: skipped, limiting links needs root" in capsys.readouterr().err


def test_an_unknown_scheduler_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match=r"'torch-2f2b': must be one of 1f1b, .*deepseek-dualpipe"):
        bench_schedules.main(["--schedulers", "1f1b,torch-2f2b"])


@pytest.mark.slow
@pytest.mark.skipif(links.unavailable() is not None, reason=f"limiting links {links.unavailable()}")
def test_a_limited_link_holds_a_message_as_long_as_asked(tmp_path):
    sizes = ["--ranks=2", "--microbatches=2", "--f=5", "--b=5", "--w=5", "--rounds=1", f"--bytes={2**21}", "--link-ms=40"]
    (result,) = run(tmp_path, "--schedulers", "1f1b", *sizes)
    assert result["transfer_ms"] == pytest.approx(40, rel=0.25)
    assert result["schedulers"][0]["steps"][0] >= 2 * result["transfer_ms"]
