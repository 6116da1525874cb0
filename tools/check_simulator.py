"""Checks the simulator against steps that really ran, and prints our overlapped pair beside DeepSeek's published one.

    python tools/check_simulator.py                     real processes over gloo whose nodes sleep; root: --realtime
    python tools/check_simulator.py --compute           whose nodes compute; needs as many free cores as ranks
    python tools/check_simulator.py --published         only the published pair, in a second

Every schedule runs node by node, pairs interleaved, as in training. From each recorded step come costs by stage and node; the
simulator runs the same program with them on a device of one worker, as a CPU is. Exit code 1 if the median error is beyond --bound
percent.
Other work on the machine makes recorded steps longer, at random: of --steps the fastest counts.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from schedule_bench import published_pair
from schedule_bench.sleeping_nodes import Work, record
from torch.multiprocessing import start_processes

from pipehc.schedules import SimulationResult, build, simulate
from pipehc.schedules.measured_nodes import measured_node_costs
from pipehc.schedules.pair_time import PairTimes
from pipehc.schedules.recording import Recording


class Check(NamedTuple):
    """ms of a recorded step, and its simulation with the costs that were taken from it."""

    name: str
    measured: float
    predicted: SimulationResult

    @property
    def error(self) -> float:
        return self.predicted.makespan / self.measured - 1


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(width=110)
    if options.published:
        console.print(published_table())
        return 0
    work = Work(blocks=options.blocks, compute=options.compute)
    try:
        checks = run(options.schedules.split(","), options.ranks, options.microbatches, work, options.steps, options.realtime)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(table(checks))
    error = 100 * median(abs(check.error) for check in checks)
    console.print(f"median error {error:.1f} %, allowed {options.bound:g} %\n")
    console.print(published_table())
    return int(error > options.bound)


def run(names: list[str], ranks: int, microbatches: int, work: Work, steps: int, realtime: bool) -> list[Check]:
    """Records steps of every schedule over `ranks` processes, and simulates the fastest of each."""
    schedules = {name: build(name, ranks, microbatches) for name in names}
    with tempfile.TemporaryDirectory(prefix="check-") as name:
        folder = Path(name)
        os.environ["OMP_NUM_THREADS"] = "1"
        job = str(folder / "store"), schedules, work, steps, folder, realtime
        start_processes(record, args=job, nprocs=ranks, start_method="fork")
        return [_check(schedule, sorted((folder / schedule).glob("*.json"))) for schedule in schedules]


def table(checks: list[Check]) -> Table:
    grid = Table(title="steps of sleeping or computing nodes, ms", title_justify="left", box=None)
    for heading in ("schedule", "recorded", "simulated", "error", "all-to-all", "exposed", "high delay"):
        grid.add_column(heading, justify="left" if heading == "schedule" else "right")
    for check in checks:
        r = check.predicted
        parts = (sum(r.all_to_all), sum(r.exposed_all_to_all), sum(r.high_delay))
        means = (f"{part / len(r.busy):.1f}" for part in parts)
        grid.add_row(check.name, f"{check.measured:.1f}", f"{r.makespan:.1f}", f"{100 * check.error:+.1f} %", *means)
    return grid


def published_table() -> Table:
    """The published pair, and ours simulated on its work."""
    grid = Table(title="one pair over 4 MoE layers of DeepSeek-V3, experts over 64 H800, ms", title_justify="left", box=None)
    for heading in ("", "pair", "compute", "all-to-all", "hidden", "exposed"):
        grid.add_column(heading, justify="right" if heading else "left")
    fastest, slowest = published_pair.spread()
    for name, pair in (
        ("DeepSeek, published profile", published_pair.PUBLISHED),
        ("ours, simulated: nodes by FLOPs", published_pair.ours()),
        ("ours, simulated: fastest division", fastest),
        ("ours, simulated: slowest division", slowest),
    ):
        grid.add_row(name, *_cells(pair))
    return grid


def _cells(pair: PairTimes) -> list[str]:
    hidden = math.floor(1000 * (1 - pair.exposed / pair.all_to_all)) / 10  # down, as published
    return [f"{pair.whole:.1f}", f"{pair.compute:.1f}", f"{pair.all_to_all:.1f}", f"{hidden:.1f} %", f"{pair.exposed:.1f}"]


def _check(name: str, files: list[Path]) -> Check:
    recordings = [Recording.load(file) for file in files]
    measured, recording = min(((max(s.end for s in r.spans), r) for r in recordings), key=lambda found: found[0])
    return Check(name, measured, simulate(recording.program(), measured_node_costs(recording, one_worker=True)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", default="dualpipe,dualpipev,1f1b,zb_h1,zbv", help="default %(default)s")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=2, help="of a stage")
    parser.add_argument("--steps", type=int, default=3, help="recorded of each schedule, after one to warm up")
    parser.add_argument("--bound", type=float, default=5.0, help="percent")
    parser.add_argument("--compute", action="store_true", help="nodes compute rather than sleep")
    parser.add_argument("--realtime", action="store_true", help="ranks take precedence over other processes (root)")
    parser.add_argument("--published", action="store_true", help="print the published pair, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
