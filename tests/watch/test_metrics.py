"""What the user sees and what stays in the run folder."""

import importlib.util
import io
import json
import math
import re

import pytest
from processes import run_ranks
from rich.console import Console

from pipehc.watch.display import Display, clock
from pipehc.watch.metrics import MetricsFile, Reporter, save_config

METRICS = {"loss": 2.5, "grad_norm": 0.75, "lr": 1e-3, "tokens_per_s": 12345.6}


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_one_line_at_once_and_evaluations_join_theirs(tmp_path):
    reporter = Reporter(tmp_path, 3, console=plain())
    reporter.evaluation(0, 5.5)
    reporter.step(1, **METRICS)
    assert lines(tmp_path) == [{"step": 0, "val_loss": 5.5}, {"step": 1, **METRICS}]  # while it is open
    reporter.step(2, **METRICS)
    reporter.evaluation(2, 0.1 + 0.2)
    reporter.step(3, **METRICS)
    reporter.finish()
    assert lines(tmp_path) == [
        {"step": 0, "val_loss": 5.5},
        {"step": 1, **METRICS},
        {"step": 2, **METRICS, "val_loss": 0.1 + 0.2},
        {"step": 3, **METRICS},
    ]


def test_an_evaluation_may_have_an_accuracy(tmp_path):
    console = plain()
    with Reporter(tmp_path, 3, console=console) as reporter:
        reporter.evaluation(0, 5.5, 0.125)
    assert lines(tmp_path) == [{"step": 0, "val_loss": 5.5, "val_accuracy": 0.125}]
    assert "step 0: validation loss 5.5000  accuracy 12.50 %" in output(console)


def test_not_finite_values_keep_the_file_valid_json(tmp_path):
    reporter = Reporter(tmp_path, 3, console=plain())
    reporter.step(1, loss=math.nan, grad_norm=math.inf)
    reporter.evaluation(1, math.nan)
    assert reporter.best is None
    reporter.close()

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None, "val_loss": None}


def test_resuming_drops_later_steps_and_a_cut_line_and_knows_the_best(tmp_path):
    first = Reporter(tmp_path, 10, console=plain())
    for step in range(1, 6):
        first.step(step, loss=float(step))
        if step != 3:
            first.evaluation(step, 10.0 - step if step < 3 else float(step))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')

    second = Reporter(tmp_path, 10, start_step=3, console=plain())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert second.best == {"step": 2, "val_loss": 8.0}  # 4.0 at step 4 is undone
    second.evaluation(3, 9.0)
    for step in range(4, 7):
        second.step(step, loss=-float(step))
    second.finish()
    got = lines(tmp_path)
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in got] == [1, 2, 3, -4, -5, -6]
    assert got[2]["val_loss"] == 9.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_without_its_file_starts_one(tmp_path):
    reporter = Reporter(tmp_path, 10, start_step=3, console=plain())
    reporter.step(4, loss=1.0)
    assert lines(tmp_path) == [{"step": 4, "loss": 1.0}]


def test_a_new_run_keeps_the_old_file_aside(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        reporter = Reporter(tmp_path, 1, console=plain())
        reporter.step(1, loss=loss)
        reporter.close()
    losses = {path.name: json.loads(path.read_text())["loss"] for path in tmp_path.iterdir()}
    assert losses == {"metrics-1.jsonl": 1.0, "metrics-2.jsonl": 2.0, "metrics.jsonl": 3.0}


def test_the_last_line_is_never_gone_while_it_grows(tmp_path):
    """It grows in place, at its end; a crash half-way costs no other line, and the rest can be read."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write(1, {"loss": 1.0})
    file.write(2, {"loss": 2.0})
    before = path.read_bytes()
    file.write(2, {"val_loss": 3.0})
    after = path.read_bytes()
    file.close()
    assert after.startswith(before[:-2])
    for cut in range(len(before) - 2, len(after)):
        path.write_bytes(after[:cut])
        again = MetricsFile(path, 1)
        again.close()
        assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_configuration_is_saved_and_an_older_one_kept(tmp_path):
    for text in ("a: 1\n", "a: 1\n", "a: 2\n", "a: 3\n"):
        assert save_config(tmp_path / "run", text).read_text() == text
    saved = {path.name: path.read_text() for path in (tmp_path / "run").iterdir()}
    assert saved == {"config.yaml": "a: 3\n", "config-1.yaml": "a: 1\n", "config-2.yaml": "a: 2\n"}


def test_plain_lines_where_output_is_no_terminal(tmp_path):
    console = plain()
    with Reporter(tmp_path, 300, config="a: 1\n", console=console) as reporter:
        reporter.evaluation(0, 5.5412)
        reporter.step(1, **METRICS)
        reporter.step(2, loss=2.25)
        reporter.evaluation(2, 2.0)
        reporter.warn("rank [3] is slow " + "x" * 80)
        reporter.finish()
    got = output(console).splitlines()
    assert "\x1b" not in output(console)
    assert got[0] == "step 0: validation loss 5.5412"
    assert re.fullmatch(r"step 1/300  loss 2\.5000  tok/s 12,346  \|grad\| 0\.75  lr 1\.00e-03  left \d+:\d\d:\d\d", got[1])
    assert re.fullmatch(r"step 2/300  loss 2\.2500  left \d+:\d\d:\d\d", got[2])
    assert got[4] == "warning: rank [3] is slow " + "x" * 80
    assert got[5] == f"done: best validation loss 2.0000 at step 2; metrics.jsonl, config.yaml and checkpoints are in {tmp_path}"
    assert len(got) == 6


def test_time_left_counts_this_run_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console = plain()
    display = Display(100, 90, console)
    display.step(90, {})
    now[0] += 30.0
    display.step(93, {})  # 10 s a step, 7 to go
    display.step(100, {})
    assert re.findall(r"left (\S+)", output(console)) == ["?", "0:01:10", "0:00:00"]
    assert [clock(s) for s in (8.2, 59.9, 100_000)] == ["0:00:09", "0:01:00", "27:46:40"]


@pytest.mark.parametrize("width", [80, 120])
def test_one_live_line_on_a_terminal(tmp_path, width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    reporter = Reporter(tmp_path, 300, start_step=100, console=console)
    for step in range(101, 104):
        reporter.step(step, **METRICS)
    reporter.warn("slow")
    reporter.finish()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", output(console)).replace("\r", "\n").split("\n")
    drawn = [line.strip() for line in shown if line.startswith("step") and "103/300" in line]
    assert drawn and all(len(line) <= width for line in drawn)
    assert all("loss 2.5000  tok/s 12,346  |grad| 0.75  lr 1.00e-03  left 0:0" in line for line in drawn)
    assert any("━" in line for line in drawn) == (width == 120)
    assert "warning: slow" in shown and "\x1b[?25h" in output(console)  # the cursor is back


def test_the_terminal_is_given_back_when_training_fails(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with pytest.raises(KeyError), Reporter(tmp_path, 3, console=console) as reporter:
        reporter.step(1, loss=1.0)
        raise KeyError
    assert output(console).rfind("\x1b[?25h") > output(console).rfind("\x1b[?25l") >= 0
    assert "done:" not in output(console)


def test_only_the_main_rank_writes_and_prints(tmp_path, capfd):
    def fn(rank):
        with Reporter(tmp_path / str(rank), 2, tensorboard=True, is_main=rank == 0, config="a: 1\n") as reporter:
            reporter.step(1, **METRICS)
            reporter.evaluation(1, 1.0)
            reporter.warn("attention")
            reporter.finish()
            return reporter.best

    run_ranks(fn, 2, init=False)
    assert (tmp_path / "0" / "metrics.jsonl").exists() and not (tmp_path / "1").exists()
    printed = capfd.readouterr().out
    assert printed.count("step 1/2") == printed.count("attention") == printed.count("done:") == 1


def test_tensorboard_has_each_step_once_after_resuming(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, sign in ((0, 1.0), (2, -1.0)):
        reporter = Reporter(tmp_path, 4, start_step=start, tensorboard=True, console=plain())
        for step in range(start + 1, 5 if start else 4):
            reporter.step(step, loss=sign * step)
        reporter.evaluation(4, 7.0)
        reporter.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, -3.0), (4, -4.0)]
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [(4, 7.0)]


@pytest.mark.parametrize("is_main", [True, False])
def test_tensorboard_not_installed_is_said_before_anything_is_written(tmp_path, monkeypatch, is_main):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.tensorboard.*pip install 'pipehc\[viz\]'"):
        Reporter(tmp_path / "run", 3, tensorboard=True, is_main=is_main)
    assert not (tmp_path / "run").exists()


def test_diagnostics_lie_beside_the_metrics(tmp_path):
    def lines():
        return [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]

    figures = {"kind": "none", "stream_norm": [[1.0], [math.nan]], "gradient": [2.0, 1.0]}
    with Reporter(tmp_path, 30, diagnostics=True, console=Console(file=io.StringIO())) as reporter:
        reporter.streams(10, figures, ["it runs away"])
        reporter.streams(20, figures)
    first, second = lines()
    assert first == {"step": 10, **figures, "stream_norm": [[1.0], [None]], "warnings": ["it runs away"]}
    assert second["step"] == 20 and "warnings" not in second
    out = io.StringIO()
    with Reporter(tmp_path, 30, start_step=15, diagnostics=True, console=Console(file=out)) as reporter:
        reporter.streams(20, figures, ["again"])
    assert [line["step"] for line in lines()] == [10, 20] and "warning: step 20: again" in out.getvalue()


def test_figures_of_another_course_do_not_stay_beside_new_metrics(tmp_path):
    quiet = {"console": Console(file=io.StringIO())}
    figures = {"stream_norm": [[1.0], [None]], "gradient": [2.0, 1.0]}
    with Reporter(tmp_path, 30, diagnostics=True, **quiet) as reporter:
        reporter.streams(10, figures)
        reporter.streams(20, figures)
    with Reporter(tmp_path, 30, start_step=15, **quiet) as reporter:  # goes on without figures
        assert [line["step"] for line in reporter.earlier_streams] == [10]
    assert (tmp_path / "diagnostics.jsonl").read_text().count("step") == 1
    with Reporter(tmp_path, 30, **quiet):  # a new start
        pass
    assert (tmp_path / "diagnostics-1.jsonl").exists() and not (tmp_path / "diagnostics.jsonl").read_text()
