"""python -m pipehc.schedules show: what it prints, the files it writes, and how it says no."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipehc.schedules import FAMILIES, Schedule, build
from pipehc.schedules.__main__ import main

SMALL = ["--ranks", "2", "--microbatches", "6"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("more", [[], ["--forward"]])
def test_every_family_is_shown(name: str, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name, *SMALL, *more]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}: 2 ranks, 6 micro-batches, step ")
    assert re.search(r"^rank 0 .*F0", out, re.M) and re.search(r"^rank 1 .*F\d", out, re.M)
    assert ("W5" in out or "B5" in out) == (not more)


def test_the_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "pipehc.schedules", "show", "dualpipe", "--ranks", "8", "--microbatches", "20"]
    times = ["--f", "40", "--b", "40", "--w", "40"]
    done = subprocess.run([*command, *times], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dualpipe: 8 ranks, 20 micro-batches, step 2520, bubble 120 (4.8 %)")
    assert len(re.findall(r"^rank [0-7] ", done.stdout, re.M)) % 8 == 0


def test_costs_reach_the_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for more in ([], ["--link", "0.5"], ["--link", "0.5", "--latency", "0.25"], ["--w", "3"], ["--r", "0.5"]):
        assert main(["show", "1f1b", *SMALL, *more]) == 0
        out = capsys.readouterr().out
        steps.append(float(re.search(r"step ([\d.]+)", out).group(1)))  # type: ignore[union-attr]
        assert ("R0" in out) == ("--r" in more)
    assert steps[0] < steps[1] < steps[2] and steps[3] > steps[0] + 11 and steps[4] > steps[0]


def test_a_search_is_shown_with_its_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["show", "auto", *SMALL, "--placements", "linear", "--max-live", "2", "--time-limit", "1", "--compare", "1f1b"]) == 0
    )
    captured = capsys.readouterr()
    assert re.match(r"auto: step [\d.]+, proven lower bound [\d.]+; best named schedule \w+: [\d.]+\n", captured.err)
    assert captured.out.count("2 ranks, 6 micro-batches, step ") == 2


def test_the_high_priority_queue_is_simulated_if_it_has_work(tmp_path: Path) -> None:
    assert main(["show", "dualpipe", *SMALL, "--f", "4", "--b", "4", "--high", "1", "--svg", str(tmp_path / "s.svg")]) == 0
    assert ", high: " in (tmp_path / "s.svg").read_text()


def test_comparison_shows_both_on_one_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "interleaved", "--ranks", "2", "--microbatches", "4", "--chunks", "3", "--compare", "1f1b"]) == 0
    out = capsys.readouterr().out
    assert "interleaved: 2 ranks" in out and "1f1b: 2 ranks" in out
    grids = [line for line in out.splitlines() if line.startswith("rank 0 ")]
    assert len(grids[0]) < len(grids[1])  # the shorter step is drawn shorter


def test_every_file_is_written_and_the_csv_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = {kind: str(tmp_path / f"s.{kind}") for kind in ("csv", "svg", "png", "html", "trace")}
    flags = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    assert main(["show", "zbv", *SMALL, *flags]) == 0
    assert capsys.readouterr().out == ""
    assert Schedule.from_csv(files["csv"]).rows == build("zbv", 2, 6).rows
    assert Path(files["svg"]).read_text().startswith("<svg") and Path(files["png"]).read_bytes()[1:4] == b"PNG"
    assert Path(files["html"]).read_text().startswith("<!doctype html>")
    assert json.loads(Path(files["trace"]).read_text())["traceEvents"]

    assert main(["show", files["csv"]]) == 0
    assert capsys.readouterr().out.startswith("s: 2 ranks, 6 micro-batches, step ")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["dualpipe", "--ranks", "3", "--microbatches", "8"], "error: ranks = 3: dualpipe needs an even number, at least 2"),
        (["2f2b", *SMALL], "error: schedule = '2f2b': must be one of gpipe, 1f1b"),
        (["1f1b", "--ranks", "2"], "error: 1f1b: needs --microbatches"),
        (["1f1b", *SMALL, "--chunks", "2"], "error: chunks = 2: 1f1b has a fixed number"),
        (["1f1b", *SMALL, "--f", "-1"], "error: costs.f = -1.0: must be a number >= 0"),
        (["1f1b", *SMALL, "--compare", "gpipe", "--csv", "x"], "error: --csv x: holds one schedule"),
        (["1f1b", "--ranks", "0", "--microbatches", "4"], "error: ranks = 0: must be at least 1"),
        (["gpipe", "--ranks", "2", "--microbatches", "0"], "error: microbatches = 0: must be at least 1"),
        (["1f1b", *SMALL, "--max-live", "3"], "error: --max-live 3.0: only auto takes it"),
        (["1f1b", *SMALL, "--compare", "gpipe", "--seed", "0"], "error: --seed 0: only auto takes it"),
        (["nowhere.csv", "--ranks", "7"], "error: --ranks 7: a CSV file has its own schedule"),
        (["auto", *SMALL, "--time-limit", "nan"], "error: time_limit = nan: must be more than 0"),
        (["nowhere.csv"], "error: [Errno 2] No such file or directory: 'nowhere.csv'"),
        (["1f1b", *SMALL, "--svg", "/nowhere/x.svg"], "error: [Errno 2] No such file"),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(complaint) and "Traceback" not in captured.err


def test_a_schedule_that_cannot_run_is_shown_as_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.csv").write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B1,1B0\n2F1,2F0,2B0,2B1\n")
    assert main(["show", str(tmp_path / "bad.csv")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: cannot run this schedule: deadlock: rank 0 at 0B0 waits for 1B0 of rank 1")
    assert any("[0B0]" in line and "[0F1]" in line for line in lines[1:])
