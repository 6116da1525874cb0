"""Costs from a dry run in another process: asked once, and again only if something has changed."""

import sys

import pytest

from pipehc.planning.dry_run import cached_costs as module
from pipehc.planning.dry_run.cached_costs import NoCosts, cached_costs, gpu_here
from pipehc.schedules import Costs

PROGRAM = """
import argparse, os, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--costs")
parser.add_argument("text")
given = parser.parse_args()
assert "WORLD_SIZE" not in os.environ and "MASTER_ADDR" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == ""
print("asked", file=open("asked", "a"))
if given.text:
    pathlib.Path(given.costs).write_text(given.text)
else:
    raise SystemExit("a sentence")
"""


@pytest.fixture
def ask(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "nowhere")

    def ask(text, **identity):
        costs = cached_costs(["-m", "stand_in", text], identity)
        return costs, len((tmp_path / "asked").read_text().splitlines())

    return ask


def test_the_same_question_is_asked_once(ask, tmp_path, monkeypatch):
    costs = Costs(table={(0, "F"): 1.5, (0, "B"): 1, (0, "W"): 1}, link=0.25)
    assert ask(costs.to_json(), key=1) == (costs, 1)
    assert ask("", key=1) == (costs, 1)
    assert ask('{"f": 2}', key=2) == (Costs(f=2), 2)
    (file,) = [path for path in (tmp_path / "cache" / "pipehc").iterdir() if Costs.from_json(path.read_text()) == costs]
    file.write_text(file.read_text()[:-9])  # damaged: asked again, and mended
    assert ask(costs.to_json(), key=1) == (costs, 3) and ask("", key=1) == (costs, 3)
    monkeypatch.setattr(module, "_sources", lambda: "other sources")
    assert ask('{"f": 3}', key=1) == (Costs(f=3), 4)


def test_without_a_place_for_it_it_is_asked_every_time(ask, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert [ask('{"f": 2}')[1] for _ in range(2)] == [1, 2]


def test_what_fails_is_said(ask):
    for _ in range(2):
        with pytest.raises(NoCosts, match=r"^a sentence$"):
            ask("")


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA B200", "b200"),
     ("", "h100"), ("NVIDIA GeForce RTX 4090", "h100")],
)  # fmt: skip
def test_the_gpu_that_is_there(device, name):
    assert gpu_here(device) == name


@pytest.mark.parametrize("text", ["", "[]", '{"f": -1}', '{"speed": 1}', '{"f": "x"}', '{"table": [[[0, "Q"], 1]]}', "{"])
def test_what_is_no_costs_is_a_value_error(text):
    with pytest.raises(ValueError):
        Costs.from_json(text)


def test_this_interpreter_is_used(ask, monkeypatch):
    monkeypatch.setattr(sys, "executable", "no-such-python")
    with pytest.raises(NoCosts, match="no-such-python"):
        ask("")
