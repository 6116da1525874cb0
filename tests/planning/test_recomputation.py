"""Which recomputation pays most: the choices, what is said of them, and the command."""

import io

import pytest
from rich.console import Console
from tiny_model import DEMO, TINY, tiny_config

from pipehc.plan import main
from pipehc.planning.dry_run.recomputation import GIB, best, choices, rows, show


def told(gib, ms):
    return {"ranks": [{"total_bytes": gib * GIB / 2}, {"total_bytes": gib * GIB}], "step": {"ms": ms}}


def test_every_choice_is_there_once():
    own = tiny_config("recompute.enabled=true", "recompute.block=2", "recompute.modules=[swiglu]")
    found = choices(own)
    assert [(c.recompute.enabled, c.recompute.modules) for c in found] == [
        (enabled, modules)
        for enabled in (False, True)
        for modules in ((), ("swiglu",), ("mla_up_proj",), ("swiglu", "mla_up_proj"))
    ]
    assert own in found and {c.recompute.block for c in found} == {2}
    assert [c.recompute.modules for c in choices(tiny_config("residual.kind=none"))] == [c.recompute.modules for c in found[:4]]
    assert [c.recompute.enabled for c in choices(tiny_config("runtime.fused=false"))] == [False, True]


def test_what_is_said():
    configs = choices(tiny_config("residual.kind=none"))
    found = rows(configs, [told(40, 1000.0), told(30, 1010.0), told(35, 1000.0), told(25, 1020.0)], 31)
    assert [(row["modules"], row["saved_bytes"] / GIB, row["more_ms"], row["fits"]) for row in found] == [
        ([], 0, 0, False),
        (["mla_up_proj"], 5, 0, False),
        (["swiglu"], 10, 10, True),
        (["swiglu", "mla_up_proj"], 15, 20, True),
    ]
    assert best(found) is found[2] and best(rows(configs[:1], [told(40, 1.0)], 39)) is None
    out = io.StringIO()
    show(found, "H100", 31, Console(file=out, width=100))
    lines = [" ".join(line.replace("│", " ").split()) for line in out.getvalue().splitlines()]
    assert "false [swiglu] 30.00 1,010.0 10.00 +1.0 % 10.0" in lines and "false [mla_up_proj] 35.00 1,000.0 5.00 +0.0 %" in lines
    assert "The fastest in 31 GiB: recompute.enabled=false recompute.modules=[swiglu]" in lines
    show(found[:1], "H100", 31, Console(file=out, width=100))
    assert "None fits into 31 GiB." in out.getvalue()


def test_it_is_part_of_a_dry_run(capsys):
    assert main(["--config", str(DEMO), "--recomputation"]) == 2
    assert "--recomputation: only with --dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sizes = "schedule.name=1f1b", "parallel.pp=2", "parallel.dp=1", "evaluation.interval=0"
    assert main(["--config", str(DEMO), *TINY, *sizes, "--dry-run", "--recomputation", "--memory", "80"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("swiglu") >= 4 and "The fastest in 80 GiB: recompute.enabled=" in text
