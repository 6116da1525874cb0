"""The search for a layout: composed figures are those of whole dry runs, the order, what is written, and broken questions."""

import io
import json
import subprocess
import sys
from itertools import pairwise

import pytest
from processes import run_ranks
from rich.console import Console
from tiny_model import DEMO, TINY, tiny_config

from pipehc.config.loading import load_config
from pipehc.plan import main
from pipehc.planning.search.report import show

BASE = (
    "parallel.pp=2", "parallel.dp=2", "schedule.name=dualpipe", "train.global_batch=32", "train.precision=bf16",
    "recompute.enabled=true", "model.blocks=6", "model.hidden_size=64", "train.sequence_length=256", "evaluation.interval=0",
)  # fmt: skip
MEMORY, TIME = 0.05, 0.02  # of a whole dry run; at full size a few thousandths, of memory up to 3 %


def composed(overrides):
    """(composed ms, dry run's ms, composed bytes, the dry run's bytes) of one layout."""
    from pipehc.dry_run import dry_runs
    from pipehc.layout_search import _composers
    from pipehc.planning.dry_run.hardware import load_hardware
    from pipehc.planning.dry_run.summary import summary
    from pipehc.planning.search.candidate import candidate, fill_memory, fill_step
    from pipehc.planning.search.question import Question
    from pipehc.planning.search.units import unit_of

    config, hardware = tiny_config(*BASE, *overrides), load_hardware("h100")
    unit = unit_of(config)
    one = candidate(config, _composers(config, [unit], Question(4, 80, hardware, 1.0, None))[unit])
    fill_memory(one, hardware)
    fill_step(one, hardware)
    dry = summary(dry_runs([config], hardware)[0])
    reserved = hardware.reserved.context_gib * 2**30  # not counted, and far more than a small model
    biggest = max(rank["peak_bytes"] + sum(rank["estimated_bytes"].values()) for rank in dry["ranks"])
    return one.ms, dry["step"]["ms"], one.total_bytes - reserved, biggest - reserved


def check(overrides):
    ms, whole_ms, size, whole_size = composed(overrides)
    assert ms == pytest.approx(whole_ms, rel=TIME)
    assert size == pytest.approx(whole_size, rel=MEMORY)


def test_composed_figures_are_those_of_a_whole_dry_run():
    check(("parallel.ep=2",))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("schedule.name=1f1b", "recompute.enabled=false", "residual.kind=none"),
        ("schedule.name=interleaved", "model.dense_blocks=0"),
        ("schedule.name=zbv", "parallel.blocks_per_stage=[1,2,2,1]"),
        ("schedule.name=dualpipev", "train.micro_batch=1"),
        ("model.dense_blocks=6", "runtime.overlap=false"),
        ("model.mtp_depth=2", "schedule.name=1f1b"),
        ("model.mtp_depth=2", "parallel.tp=2", "parallel.ep=2", "train.sequence_length=128"),
    ],
    ids=" ".join,
)
def test_composed_figures_are_those_of_a_whole_dry_run_elsewhere(overrides):
    check(overrides)


def run(*arguments):
    """(exit code, stdout, stderr) of the planner, in a process of its own."""

    def fn(_):
        import contextlib
        import io

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(arguments))
        return code, out.getvalue(), err.getvalue()

    return run_ranks(fn, 1, init=False)[0]


SEARCH = (
    "--config", str(DEMO), *TINY, "residual.kind=none", "train.micro_batch=1", "train.global_batch=16", "evaluation.interval=0",
    "model.experts=2", "search.time_limit=1", "--search", "--gpus", "2",
)  # fmt: skip


def searched(*arguments):
    """(exit code, stdout, stderr) of a search that gets as far as dry runs, which are processes of their own."""
    command = [sys.executable, "-W", "ignore", "-m", "pipehc.plan", *SEARCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_lists_the_fastest_first_and_writes_the_first(tmp_path):
    file = tmp_path / "best.yaml"
    code, out, error = searched("--json", "--memory", "4", "--write", str(file))
    assert code == 0, error
    found = json.loads(out)
    best = found["layouts"][0]
    assert best["source"] == "dry run" and best["total_bytes"] <= 4 * 2**30
    for source in ("dry run", "composed"):
        own = [row["ms"] for row in found["layouts"] if row["source"] == source]
        assert all(a <= b for a, b in pairwise(own))
    assert all(row["ms"] < best["ms"] and row["why"] for row in found["rejected"])
    written = load_config(file)
    p = written.parallel
    assert (p.pp, p.ep, p.dp, written.schedule.name) == (best["pp"], best["ep"], best["dp"], best["schedule"])
    console = Console(width=100, file=io.StringIO())
    show(found, console)
    out = console.file.getvalue()
    assert max(map(len, out.splitlines())) <= 100
    assert "none measured" in out and "dry run" in out and "GiB" in out and "MFU" in out


BROKEN = {
    "no number": (("--gpus", "x"), "--gpus x: must be a whole number"),
    "zero": (("--gpus", "0"), "--gpus 0: must be a whole number"),
    "negative": (("--gpus=-4",), "--gpus -4: must be a whole number"),
    "fraction": (("--gpus", "2.5"), "--gpus 2.5: must be a whole number"),
    "divides nothing": (("--gpus", "7"), "--gpus 7: no layout passes the checks"),
    "no memory": (("--gpus", "2", "--memory", "0"), "--memory 0: must be a number of GiB above 0"),
    "memory in words": (("--gpus", "2", "--memory", "much"), "--memory much: must be"),
    "memory nan": (("--gpus", "2", "--memory", "nan"), "--memory nan: must be"),
    "no gpus": ((), "--search: needs --gpus N"),
    "with recomputation": (("--gpus", "2", "--recomputation"), "--recomputation: "),
    "with a dry run": (("--gpus", "2", "--dry-run"), "--dry-run: not with --search"),
    "unknown gpu": (("--gpus", "2", "--gpu", "x100"), "--gpu x100: no such GPU"),
    "imbalance": (("--gpus", "2", "--imbalance", "0.5"), "--imbalance 0.5: must be a number from 1 on"),
    "existing file": (("--gpus", "2", "--write", "{existing}"), "exists; must be a new file"),
    "missing folder": (("--gpus", "2", "--write", "{missing}"), "must be a new file in a folder that exists"),
    "a folder": (("--gpus", "2", "--write", "{folder}"), "exists; must be a new file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_questions_end_with_one_sentence(case, tmp_path, capsys):
    arguments, words = BROKEN[case]
    existing = tmp_path / "there.yaml"
    existing.write_text("mine")
    places = {"existing": existing, "missing": tmp_path / "no" / "x.yaml", "folder": tmp_path}
    code = main(["--config", str(DEMO), *TINY, "evaluation.interval=0", "--search", *(a.format(**places) for a in arguments)])
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert words in error and len(error.splitlines()) == 1
    assert existing.read_text() == "mine"


@pytest.mark.parametrize("arguments", [("--gpus", "4"), ("--memory", "80"), ("--write", "x.yaml")])
def test_the_flags_of_a_search_need_one(arguments, capsys):
    assert main(["--config", str(DEMO), *arguments]) == 2
    assert f"{arguments[0]} {arguments[1]}: only with --search" in capsys.readouterr().err


@pytest.mark.slow
def test_too_little_memory_for_anything_says_what_the_smallest_needs():
    code, _, error = searched("--memory", "0.0001")
    assert code == 2
    assert "--memory 0.0001: none of" in error and "the smallest found needs" in error
