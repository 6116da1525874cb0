"""Times pipeline schedulers side by side: real processes over gloo, stages that sleep, equal work, steps alternating in one run.

    python tools/bench_schedules.py --ranks 8 --microbatches 20
    python tools/bench_schedules.py --ranks 4 --microbatches 16 --f 60 --b 60 --w 60 --bytes 4194304 --link-ms 15,30.7

f, b and w are the milliseconds that a rank spends on one micro-batch, over all its stages. `theory` is our simulation of the same
order with a link as fast as a message was measured to be; `ratio` is the median step over it. --link-ms limits the links between
ranks (root and iproute2 needed; skipped with a word otherwise); 0 is no limit. Sleeping tolerates other load on the machine only in
part: --realtime (root) gives the ranks precedence, and the spread tells how quiet it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from schedule_bench.links import limited_links, unavailable

from pipehc.schedules import build

OURS = ("1f1b", "interleaved", "zb_h1", "zbv", "dualpipe", "dualpipev")
RIVALS = (
    "torch-1f1b",
    "torch-interleaved1f1b",
    "torch-interleavedzerobubble",
    "torch-zbvzerobubble",
    "torch-dualpipev",
    "mcore-1f1b",
    "mcore-interleaved",
    "mcore-interleaved-overlap",
    "deepseek-dualpipe",
    "deepseek-dualpipev",
)
DEFAULT = "dualpipe,dualpipev,1f1b,auto,torch,mcore,deepseek"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    names, skipped = _names(options)
    for name, why in skipped.items():
        console.print(f"{name}: skipped, {why}")
    results = []
    for link_ms in options.link_ms:
        if link_ms and (why := unavailable()):
            console.print(f"links of {link_ms:g} ms: skipped, limiting links {why}")
            continue
        result = _run(options, names, link_ms)
        if result is None:
            return 1
        results.append(result)
        Console(width=120).print(table(result))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return 0


def table(result: dict[str, Any]) -> Table:
    """One line a scheduler, fastest first. `vs best` is how much longer it takes than the fastest."""
    link = f"links {result['link_ms']:g} ms" if result["link_ms"] else "links not limited"
    times = f"f {result['f']:g} b {result['b']:g} w {result['w']:g} ms, {result['bytes']} bytes a message"
    measured = f"measured {result['transfer_ms']:.2f} ms a message, {result['rounds']} rounds"
    title = f"{result['ranks']} ranks, {result['microbatches']} micro-batches, {times}, {link} ({measured})"
    grid = Table(title=title, title_justify="left", box=None)
    for heading in ("scheduler", "median ms", "fastest", "spread", "theory", "ratio", "vs best"):
        grid.add_column(heading, justify="left" if heading == "scheduler" else "right")
    rows = sorted(result["schedulers"], key=lambda row: row["median"])
    for row in rows:
        theory = row["theory"]
        grid.add_row(
            row["name"],
            f"{row['median']:.0f}",
            f"{min(row['steps']):.0f}",
            f"{100 * (max(row['steps']) - min(row['steps'])) / row['median']:.1f} %",
            f"{theory:.0f}" if theory else "",
            f"{row['median'] / theory:.3f}" if theory else "",
            f"+{100 * (row['median'] / rows[0]['median'] - 1):.1f} %",
        )
    return grid


def _run(options: argparse.Namespace, names: list[str], link_ms: float) -> dict[str, Any] | None:
    """Starts the ranks, waits for them, returns what rank 0 found; None after a failure, whose words are on stderr."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        job = vars(options) | {"names": names, "link_ms": link_ms, "schedules": _write_schedules(options, names, link_ms, folder)}
        spaces = stack.enter_context(limited_links(options.ranks, options.bytes, link_ms)) if link_ms else None
        job["store"], job["result"] = str(folder / "store"), str(folder / "result.json")
        (folder / "job.json").write_text(json.dumps(job))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",  # megatron-core's, about what it falls back to without CUDA
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "eth0" if spaces else "lo",
        }
        worker = [sys.executable, str(Path(__file__).parent / "schedule_bench" / "worker.py"), str(folder / "job.json")]
        processes = [
            subprocess.Popen([*(["ip", "netns", "exec", spaces[rank]] if spaces else []), *worker, str(rank)], env=environment)
            for rank in range(options.ranks)
        ]
        try:
            deadline = time.monotonic() + options.timeout
            while any(p.poll() is None for p in processes):
                if any(p.poll() for p in processes) or time.monotonic() > deadline:
                    print("a rank failed, or the time limit is over", file=sys.stderr)
                    return None
                time.sleep(0.2)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(p.returncode for p in processes):
            return None
        return json.loads((folder / "result.json").read_text())


def _write_schedules(options: argparse.Namespace, names: list[str], link_ms: float, folder: Path) -> dict[str, str]:
    """Our schedules as CSV files, by name: searched or generated once, not on every rank."""
    files = {}
    for name in names:
        if name in RIVALS:
            continue
        if name == "auto":
            schedule = _search(options, link_ms)
        else:
            schedule = build(name, options.ranks, options.microbatches)
        files[name] = str(folder / f"{name}.csv")
        schedule.to_csv(files[name])
    return files


def _search(options: argparse.Namespace, link_ms: float) -> Any:
    from pipehc.schedules import Costs, auto

    costs = Costs(f=options.f, b=options.b, w=options.w, link=link_ms)
    return auto(ranks=options.ranks, microbatches=options.microbatches, costs=costs, max_live=options.max_live, seed=0)


def _names(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The schedulers to time, and those left out, with the reason. Raises SystemExit for a name that is none."""
    names: list[str] = []
    for wish in options.schedulers.split(","):
        family = [rival for rival in RIVALS if rival.startswith(f"{wish}-")]
        if not family and wish not in (*OURS, *RIVALS, "auto"):
            known = ", ".join((*OURS, "auto", *RIVALS, "torch", "mcore", "deepseek"))
            raise SystemExit(f"--schedulers: {wish!r}: must be one of {known}")
        names += family or [wish]
    skipped = {}
    if not options.dualpipe_source:
        skipped = {name: "needs --dualpipe-source DIR" for name in names if name.startswith("deepseek-")}
    return [name for name in names if name not in skipped], skipped


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedulers", default=DEFAULT, help=f"names, or a family of them (default {DEFAULT})")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=20)
    for name, what in (("f", "forward"), ("b", "input gradient"), ("w", "weight gradient")):
        parser.add_argument(f"--{name}", type=float, default=40.0, help=f"ms of {what} per rank and micro-batch")
    parser.add_argument("--bytes", type=int, default=65536, help="of a stage message")
    parser.add_argument("--link-ms", type=lambda text: [float(x) for x in text.split(",")], default=[0.0])
    parser.add_argument("--rounds", type=int, default=5, help="steps timed of each scheduler, after one to warm up")
    parser.add_argument("--max-live", type=float, default=None, help="memory limit of auto, in activations of 1/P of the model")
    parser.add_argument("--dualpipe-source", metavar="DIR", help="a checkout of deepseek-ai/DualPipe")
    parser.add_argument("--realtime", action="store_true", help="ranks take precedence over other processes (root)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for all of one link speed")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
