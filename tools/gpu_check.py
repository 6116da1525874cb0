"""What a machine with a GPU can prove in ten minutes: make gpu-check, or

    python tools/gpu_check.py [--limit-s 570] [--only STEP ...] [--report FILE]

Runs every step that the GPUs here allow, each within a limit, goes on after one that fails, prints a table and leaves one report: a
JSON file with versions, the GPU, what every step returned and said last, kernel times beside copy bandwidth, and how far a training
over four processes was from one process. Exit code: 0 when all that ran passed, else 1. Without a GPU it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/gpu_check")
LAST_LINES, LINE = 25, 300
GRACE_S = 10.0  # what a step that is interrupted has to say what it was doing
KERNEL_TESTS = [
    *(f"tests/kernels/test_{name}.py" for name in (
        "coefficients", "pre", "coefficients_pre", "post_res", "post_res_pre", "birkhoff", "isometric", "hybrid", "identity_offset",
        "harmonized", "rebuild", "tiles", "differentiation", "rms_norm", "routing", "swiglu",
    )),
    "tests/model/test_hyper_connection.py",
]  # fmt: skip


class Wrong(Exception):
    """A step ran to its end, but not to the result that it must have. args: message, and what was found."""


@dataclass(frozen=True)
class Step:
    """name, what it proves, and the command that does. limit_s: at most this long. gpus: that it needs. then: looks at what the
    command left and returns it for the report, or raises Wrong."""

    name: str
    proves: str
    command: list[str]
    limit_s: float
    gpus: int = 1
    then: Callable[[], dict[str, Any]] | None = None


# -- training over processes equals training in one

STEPS = 10
TOLERANCE = {"loss": 1e-3, "grad_norm": 1e-2}
"""Largest relative difference in any step. On a CPU they are 8e-7 and 2e-5, from sums in other orders; on a GPU sums come in any
order, and a token near the border between two experts may take another way. A gradient that is lost, doubled or late changes the
norm by far more."""


def training(folder: str, processes: int, *overrides: str) -> list[str]:
    """A command that trains the demo in fp32, always from the start, into a folder of RUNS."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "pipehc.train",
        "--config", "configs/cpu_demo.yaml", f"train.steps={STEPS}", "evaluation.interval=0", "checkpoint.interval=0",
        "optimizer.warmup_steps=5", "optimizer.decay=[]", "data.paths=[pipehc]", "checkpoint.resume=never",
        f"run.folder={RUNS / folder}", *overrides,
    ]  # fmt: skip


def figures(folder: str) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (RUNS / folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def trained(folder: str) -> Callable[[], dict[str, Any]]:
    def look() -> dict[str, Any]:
        found = figures(folder)
        return {key: [found[step][key] for step in sorted(found)] for key in ("loss", "grad_norm", "tokens_per_s")}

    return look


def difference(expected: float, found: float) -> float:
    """Relative to the first; infinite for what is no number, which no maximum would show."""
    share = abs(found - expected) / abs(expected)
    return math.inf if math.isnan(share) else share


def equals_one_process(folder: str, one: str = "one") -> Callable[[], dict[str, Any]]:
    def compare() -> dict[str, Any]:
        if not (RUNS / one / "metrics.jsonl").exists():
            raise Wrong("there is no training in one process to compare with", {})
        expected, found = figures(one), figures(folder)
        if expected.keys() != found.keys():
            raise Wrong(f"steps {sorted(found)} instead of {sorted(expected)}", {})
        pairs = [(expected[step], found[step]) for step in expected]
        worst = {key: max(difference(a[key], b[key]) for a, b in pairs) for key in TOLERANCE}
        results = trained(folder)() | {"largest relative difference": worst, "allowed": TOLERANCE}
        if any(worst[key] > TOLERANCE[key] for key in worst):
            raise Wrong(f"differs from one process: {worst}, allowed {TOLERANCE}", results)
        return results

    return compare


def kernel_times() -> dict[str, Any]:
    return dict(json.loads((RUNS / "kernels.json").read_text()))


FOUR = "parallel.pp=4", "schedule.name=dualpipe", "recompute.enabled=true", "runtime.overlap=true", "trace.steps=[8,8]"
EXPERTS = "parallel.pp=2", "parallel.ep=2", *FOUR[1:]
ONE = "parallel.pp=1", "schedule.name=1f1b", "trace.steps=null"


def steps() -> list[Step]:
    """The most telling first: what there is no time for is the last."""
    python = sys.executable
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8 else []
    recorded = str(RUNS / "four-host" / "trace" / "step-000008.json")
    return [
        Step(
            "one process", "kernels, layers and optimizer train the demo on this GPU",
            training("one", 1, *ONE), 150, then=trained("one"),
        ),
        Step(
            "four processes, one GPU",
            "streams, overlapped pairs, recomputation and gradients are right: equal to one process, messages through host memory",
            training("four-host", 4, *FOUR, "runtime.transport=host"), 180, then=equals_one_process("four-host"),
        ),
        Step(
            "experts, one GPU",
            "all-to-alls of experts inside of overlapped pairs, and sums over replicas: equal to one process",
            training("experts-host", 4, *EXPERTS, "runtime.transport=host"), 180, then=equals_one_process("experts-host"),
        ),
        Step(
            "recorded step", "a step recorded with events of the device can be read",
            [python, "-m", "pipehc.report", recorded], 30,
        ),
        Step(
            "four GPUs", "the same with NCCL: messages between GPUs, their order and their streams",
            training("four-nccl", 4, *FOUR), 180, gpus=4, then=equals_one_process("four-nccl"),
        ),
        Step(
            "bf16", "the precision of real trainings runs",
            training("bf16", 1, *ONE, "train.precision=bf16"), 60, then=trained("bf16"),
        ),
        Step(
            "kernel times", "kernels beside eager PyTorch, torch.compile and the bandwidth of a copy",
            [python, "tools/bench_kernels.py", "--json", str(RUNS / "kernels.json")], 150, then=kernel_times,
        ),
        Step(
            "kernel tests", "every kernel equals its reference in fp64, compiled for this GPU",
            [python, "-m", "pytest", "--maxfail=20", *side_by_side, *KERNEL_TESTS], 480,
        ),
    ]  # fmt: skip


# -- running them


def run(step: Step, limit_s: float, log: Path) -> dict[str, Any]:
    """Runs a step with its output in `log`; what the report says of it."""
    began = time.monotonic()
    entry: dict[str, Any] = {"name": step.name, "proves": step.proves, "command": shlex.join(step.command)}
    # All processes are on this machine, whose name need not resolve.
    said: list[str] = []  # before it was interrupted: torchrun's traceback then hides it
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | os.environ
    with open(log, "w") as output:
        process = subprocess.Popen(step.command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            entry["rc"] = process.wait(limit_s)
            entry["outcome"] = "passed" if entry["rc"] == 0 else "failed"
        except subprocess.TimeoutExpired:
            entry |= {"rc": None, "outcome": "timed out", "problem": f"not done after {limit_s:.0f} s"}
            said = log.read_text(errors="replace").splitlines()
        finally:
            _end(process)
    if entry["outcome"] == "passed" and step.then is not None:
        try:
            entry["results"] = step.then()
        except Wrong as wrong:
            entry |= {"outcome": "failed", "problem": wrong.args[0], "results": wrong.args[1]}
        except (OSError, ValueError, KeyError) as error:
            entry |= {"outcome": "failed", "problem": f"what it should have left cannot be read: {error!r}"}
    lines = log.read_text(errors="replace").splitlines()[len(said) :]
    last = [line[:LINE] for line in said[-LAST_LINES:] + lines[-LAST_LINES:]]
    return entry | {"seconds": round(time.monotonic() - began, 1), "last_lines": last}


def _end(process: subprocess.Popen) -> None:
    """Ends a step and all that it started; torchrun puts its processes into sessions of their own."""
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)  # pytest then prints what failed so far, torchrun ends its processes
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for descendant in descendants:
        if descendant.is_running():
            descendant.kill()


def run_all(chosen: list[Step], gpus: int, limit_s: float, folder: Path) -> list[dict[str, Any]]:
    """The entries of all steps, in their order; those that there are no GPUs or no time for are skipped, and say so."""
    deadline, entries = time.monotonic() + limit_s, []
    folder.mkdir(parents=True, exist_ok=True)
    for step in chosen:
        left = deadline - time.monotonic() - GRACE_S
        entry: dict[str, Any] = {"name": step.name, "proves": step.proves, "outcome": "skipped", "seconds": 0.0}
        if step.gpus > gpus:
            entry["problem"] = f"needs {step.gpus} GPUs, here: {gpus}"
        elif left < min(10.0, step.limit_s):
            entry["problem"] = f"no time left of --limit-s {limit_s:g}"
        else:
            print(f"{step.name}: {step.proves} ...", flush=True)
            entry = run(step, min(step.limit_s, left), folder / f"{step.name.replace(' ', '-').replace(',', '')}.log")
            print(f"{step.name}: {entry['outcome']} after {entry['seconds']:.0f} s", flush=True)
            if entry["outcome"] != "passed":
                print("\n".join([entry.get("problem", ""), *entry["last_lines"]]).strip(), flush=True)
        entries.append(entry)
    return entries


def gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def facts() -> dict[str, Any]:
    """Versions, and what torch sees of the GPUs."""
    versions: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "megatron-core", "numpy", "pydantic"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    versions["commit"] = commit.stdout.strip() or None
    found = [torch.cuda.get_device_properties(i) for i in range(gpus())]
    devices = [
        {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count} for p in found
    ]
    return {"versions": versions, "gpus": devices}


def show(entries: list[dict[str, Any]]) -> None:
    table = Table("step", "outcome", "s", "proves, or what is wrong")
    for entry in entries:
        results = entry.get("results", {})
        worst = results.get("largest relative difference")
        more = f"; differs by {worst['loss']:.1e} (loss), {worst['grad_norm']:.1e} (gradient norm)" if worst else ""
        table.add_row(entry["name"], entry["outcome"], f"{entry['seconds']:.0f}", entry.get("problem", entry["proves"] + more))
    Console(width=140).print(table)


def main(arguments: list[str] | None = None) -> int:
    everything = steps()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-s", type=float, default=570, help="for all steps together")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[step.name for step in everything], help="by name")
    parser.add_argument("--report", type=Path, default=ROOT / RUNS / "report.json")
    options = parser.parse_args(arguments)
    if not gpus():
        print("no CUDA device here: nothing to check")
        return 0
    report = options.report.absolute()
    os.chdir(ROOT)
    chosen = [step for step in everything if options.only is None or step.name in options.only]
    entries = run_all(chosen, gpus(), options.limit_s, RUNS)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(facts() | {"steps": entries}, indent=1))
    show(entries)
    print(f"report: {report}")
    return int(any(entry["outcome"] in ("failed", "timed out") for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
