"""The check of a GPU machine: it goes on after what fails or hangs, leaves a report, and tells a wrong training from a right."""

import importlib.util
import json
import re
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check  # dataclasses look their module up
spec.loader.exec_module(gpu_check)

Step = gpu_check.Step


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "RUNS", tmp_path)
    return tmp_path


def write(folder, name, lines):
    (folder / name).mkdir()
    lines = [json.dumps({"step": step, "loss": loss, "grad_norm": norm, "tokens_per_s": 1}) for step, loss, norm in lines]
    (folder / name / "metrics.jsonl").write_text("\n".join(lines))


def test_without_a_gpu_there_is_nothing_to_check(folder, capsys):
    if gpu_check.gpus():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 0
    assert "no CUDA device here" in capsys.readouterr().out and list(folder.iterdir()) == []


def test_every_step_is_tried_and_reported(folder, monkeypatch, capsys):
    """One passes, one fails, one hangs with a child in a session of its own, one has too few GPUs, two leave what is wrong."""
    pid = folder / "pid"
    hang = f"""
import subprocess, sys, time
print("doing things", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open({str(pid)!r}, "w").write(str(child.pid))
time.sleep(600)
"""

    def wrong():
        raise gpu_check.Wrong("differs", {"by": 3})

    steps = [
        Step("passes", "a", python("print('done')"), 60, then=lambda: {"figure": 1}),
        Step("fails", "b", python("print('a line'); raise SystemExit(7)"), 60),
        Step("hangs, with a child", "c", python(hang), 3),
        Step("large", "d", python(""), 60, gpus=4),
        Step("is wrong", "e", python(""), 60, then=wrong),
        Step("leaves nothing", "f", python(""), 60, then=gpu_check.kernel_times),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda: steps)
    monkeypatch.setattr(gpu_check, "gpus", lambda: 1)
    monkeypatch.setattr(gpu_check, "facts", lambda: {"versions": {}})
    monkeypatch.chdir(ROOT)
    assert gpu_check.main(["--report", str(folder / "r" / "report.json")]) == 1
    report = json.loads((folder / "r" / "report.json").read_text())
    found = {entry["name"]: entry for entry in report["steps"]}
    outcomes = {name: entry["outcome"] for name, entry in found.items()}
    assert outcomes == {
        "passes": "passed", "fails": "failed", "hangs, with a child": "timed out", "large": "skipped", "is wrong": "failed",
        "leaves nothing": "failed",
    }  # fmt: skip
    assert found["passes"]["results"] == {"figure": 1} and found["passes"]["last_lines"] == ["done"]
    assert found["fails"]["rc"] == 7 and found["fails"]["last_lines"][0] == "a line"
    assert found["hangs, with a child"]["last_lines"][0] == "doing things" and found["hangs, with a child"]["seconds"] < 60
    child = int(pid.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found["large"]["problem"] == "needs 4 GPUs, here: 1" and found["is wrong"]["results"] == {"by": 3}
    printed = capsys.readouterr().out
    assert all(name.split(",")[0] in printed for name in outcomes)

    assert gpu_check.main(["--only", "passes", "--report", str(folder / "second.json")]) == 0
    assert gpu_check.main(["--limit-s", "1", "--report", str(folder / "third.json")]) == 0  # no time for any
    third = json.loads((folder / "third.json").read_text())["steps"]
    assert {entry["outcome"] for entry in third} == {"skipped"} and "no time left" in third[0]["problem"]


def test_a_training_equals_one_process_within_the_tolerance(folder):
    one = [(1, 5.0, 7.0), (2, 4.0, 6.0)]
    compare = gpu_check.equals_one_process("four")
    with pytest.raises(gpu_check.Wrong, match="no training in one process"):
        compare()
    write(folder, "one", one)
    write(folder, "four", [(1, 5.0001, 7.0), (2, 4.0, 6.01)])
    found = compare()
    assert found["largest relative difference"] == pytest.approx({"loss": 2e-5, "grad_norm": 1 / 600})
    assert found["loss"] == [5.0001, 4.0]
    for name, lines in {"norm": [one[0], (2, 4.0, 6.1)], "nan": [one[0], (2, float("nan"), 6.0)], "short": one[:1]}.items():
        write(folder, name, lines)
        with pytest.raises(gpu_check.Wrong, match=r"differs from one process|instead of"):
            gpu_check.equals_one_process(name)()


def test_its_commands_exist():
    """Files of tests, keys of the configuration, options of the tools."""
    from pipehc.config.loading import check_world_size, load_config

    for step in gpu_check.steps():
        names = [part for part in step.command if part.endswith(".py")]
        assert all((ROOT / name).is_file() for name in names), step
        if "pipehc.train" in step.command:
            config = load_config(ROOT / "configs" / "cpu_demo.yaml", step.command[step.command.index("--config") + 2 :])
            check_world_size(config, int(step.command[step.command.index("--nproc-per-node") + 1]))
    kernels = {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    # What they ask needs no GPU.
    without = {"test_compiled.py", "test_feed_forward_compiled.py", "test_language.py", "test_shapes.py"}
    assert kernels - without == {Path(name).name for name in gpu_check.KERNEL_TESTS if "tests/kernels/" in name}


def test_the_wheels_of_make_are_what_pyproject_needs_beside_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["check"]
    names = {re.split(r"[<>=!; ]", text)[0] for text in needed} - {"torch", "triton"}
    named = set(re.search(r"^LIGHT := (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()) | {"megatron-core"}
    assert names <= named and named - names == {"packaging", "setuptools"}  # of megatron-core, and to install this checkout
