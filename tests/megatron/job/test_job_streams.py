"""Diagnostics of the streams in a job: the same figures in every layout, and no bit of the job changed."""

import json
from pathlib import Path

import pytest
from megatron_job import train
from processes import run_ranks

from pipehc.megatron.job.diagnostics import Diagnostics

TWO = (2, {"schedule": "dualpipe", "pp": 2})
MORE = [
    (4, {"schedule": "dualpipe", "pp": 2, "tp": 2}),  # and sequence parallelism
    (4, {"schedule": "dualpipev", "pp": 2, "vpp": 2, "ep": 2}),
    (2, {"schedule": "1f1b", "cp": 2}),
]


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "diagnostics.jsonl").read_text().splitlines()]


def run(tmp_path, name, processes, arguments, residual):
    """(what was trained, by rank; the lines that were written)."""
    folder = tmp_path / name
    options = {"diagnostics_interval": 1, "diagnostics_folder": str(folder)} if name != "blind" else {}
    trained = run_ranks(train, processes, {"residual": residual, "run": options, "layers": 4, **arguments}, 2, timeout=240)
    return trained, lines(folder) if options else []


def near(found, wanted, path=""):
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            near(found[key], wanted[key], f"{path}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), path
        for i, (a, b) in enumerate(zip(found, wanted)):
            near(a, b, f"{path}[{i}]")
    else:
        assert found == (wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=3e-5, abs=3e-7)), path


@pytest.mark.parametrize("residual", ["mhc", None, pytest.param("harmonized", marks=pytest.mark.slow)])
def test_every_layout_shows_the_same(residual, tmp_path):
    _, expected = run(tmp_path, "one", 1, {"schedule": "1f1b"}, residual)
    assert [line["step"] for line in expected] == [1, 2] and expected[0]["sublayers"] == 8 == len(expected[0]["gradient"]) - 1
    assert all(g > 0 for g in expected[0]["gradient"]) and expected[0]["kind"] == (residual or "none")
    if residual == "harmonized":
        assert expected[0]["s"] == 1.0 and expected[0]["gain_average"] > 1
    for processes, arguments in [TWO, *(MORE if residual == "harmonized" else ())]:
        trained, found = run(tmp_path, str(arguments), processes, arguments, residual)
        near(found[0], expected[0])
        if arguments is TWO[1]:
            assert trained == run(tmp_path, "blind", processes, arguments, residual)[0]


@pytest.mark.slow
def test_a_hybrid_model_has_a_sub_layer_for_every_layer(tmp_path):
    _, expected = run(tmp_path, "one", 1, {"schedule": "1f1b", "pattern": "+-+E+"}, "mhc")
    assert expected[0]["layers"] == "+-+E+" and expected[0]["sublayers"] == 5 == len(expected[0]["maps"])
    _, found = run(tmp_path, "two", 2, {"schedule": "dualpipe", "pp": 2, "pattern": "+-|+E+"}, "mhc")
    near(found[0], expected[0])


def test_lines_of_a_course_that_was_given_up_go(tmp_path):
    def written(steps, start=1):
        diagnostics = Diagnostics(1, tmp_path, 20.0)
        for step in steps:
            diagnostics._open(step) if diagnostics._file is None else None
            diagnostics._file.write(step, {"kind": "none"})
        return [line["step"] for line in lines(tmp_path)]

    assert written([1, 2, 3, 4]) == [1, 2, 3, 4]
    assert written([3, 4, 5]) == [1, 2, 3, 4, 5]
    assert written([1]) == [1]  # a new start
    assert (tmp_path / "diagnostics-1.jsonl").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"diagnostics_interval": -1}, "diagnostics_interval = -1: must be at least 0 iterations"),
        ({"diagnostics_interval": True}, "diagnostics_interval = True"),
        ({"gain_bound": 1}, "gain_bound = 1: must be more than 1"),
        ({"diagnostics_folder": ""}, "diagnostics_folder = ''"),
    ],
)
def test_wrong_options(options, words):
    from pipehc.megatron import forward_backward_func

    with pytest.raises(ValueError) as error:
        forward_backward_func("1f1b", **options)
    assert words in str(error.value)


def test_megatrons_own_schedule_has_none():
    from pipehc.megatron import forward_backward_func

    with pytest.raises(ValueError, match="diagnostics_interval = 5: only with a schedule of ours"):
        forward_backward_func("megatron", diagnostics_interval=5)
