#!/usr/bin/env python3
"""Compares `auto` with the best named schedule over a grid of problems, and prints a table and a summary.

The grid: P x M of 2x8, 4x16, 5x20, 6x24, 8x32 and 16x64; a message holds its link for 0, 0.3, 0.6 or 1 times F; F:I:W of 1:1:1,
1:1.5:0.8 and 1:2:0.5; caps of P, P+1, 1.5 P and 2 P; every other problem has uneven stages (a light first one, a heavy last
one). Named are all families on any placement, interleaved with 2 and with 4 chunks, that respect the cap.

    auto_table.py [--time-limit 10] [--seed 0] [--ranks 2 4 ...] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from typing import NamedTuple

from pipehc.schedules import FAMILIES, Costs, auto_report, build, check, simulate
from pipehc.schedules.auto import PLACEMENTS

SIZES = ((2, 8), (4, 16), (5, 20), (6, 24), (8, 32), (16, 64))
LINKS = (0.0, 0.3, 0.6, 1.0)
RATIOS = ((1.0, 1.0, 1.0), (1.0, 1.5, 0.8), (1.0, 2.0, 0.5))


class Case(NamedTuple):
    ranks: int
    microbatches: int
    costs: Costs
    cap: float


def grid() -> Iterator[Case]:
    """72 problems; ratios, caps and uneven stages are spread so that every size and link sees all of them."""
    for i, (ranks, microbatches) in enumerate(SIZES):
        for j, link in enumerate(LINKS):
            for k, (f, b, w) in enumerate(RATIOS):
                cap = (ranks, ranks + 1, 1.5 * ranks, 2 * ranks)[(i + j + k) % 4]
                weights = (0.8, *[1.0] * (ranks - 2), 1.3) if (i + j + k // 2) % 2 else None
                yield Case(ranks, microbatches, Costs(10 * f, 10 * b, 10 * w, link=10 * link, weights=weights), cap)


def best_named(case: Case) -> tuple[float, str]:
    """Makespan and name of the best named schedule within the cap."""
    found = [(float("inf"), "none")]
    for name in FAMILIES:
        for chunks in (2, 4) if name == "interleaved" else (None,):
            try:
                options = {} if chunks is None else {"chunks": chunks}
                schedule = build(name, case.ranks, case.microbatches, **options)
            except ValueError:
                continue  # not for these numbers
            if max(check(schedule).peak_live) <= case.cap + 1e-9:
                found.append((simulate(schedule, case.costs).makespan, name + str(chunks or "")))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds a problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="*", help="only these numbers of ranks")
    parser.add_argument("--csv", help="write the table to this file, too")
    arguments = parser.parse_args()
    head = ("P", "M", "F:I:W", "link", "uneven", "cap", "named", "time", "auto", "placement", "gain %", "bound", "gap %", "s")
    layout = "{:>3} {:>3} {:>9} {:>5} {:>6} {:>5} {:>12} {:>8} {:>8} {:>13} {:>7} {:>8} {:>6} {:>5}"
    print(layout.format(*head), flush=True)
    rows: list[tuple] = []
    gains, gaps = [], []
    for case in grid():
        if arguments.ranks and case.ranks not in arguments.ranks:
            continue
        costs = case.costs
        named, name = best_named(case)
        start = time.monotonic()
        report = auto_report(
            case.ranks, case.microbatches, costs, case.cap, PLACEMENTS, time_limit=arguments.time_limit, seed=arguments.seed
        )
        seconds = time.monotonic() - start
        gains.append(100 * (1 - report.makespan / named))
        gaps.append(100 * report.gap)
        ratio = ":".join(f"{x / costs.f:g}" for x in (costs.f, costs.b, costs.w))
        placement = report.schedule.placement.kind
        problem = (case.ranks, case.microbatches, ratio, f"{costs.link / costs.f:g}", "yes" if costs.weights else "no")
        times = (f"{named:.1f}", f"{report.makespan:.1f}", placement, f"{gains[-1]:.2f}", f"{report.lower_bound:.1f}")
        row = (*problem, f"{case.cap:g}", name, *times, f"{gaps[-1]:.2f}", f"{seconds:.1f}")
        rows.append(row)
        print(layout.format(*row), flush=True)
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *rows])
    count = len(rows)
    print(f"\n{count} problems: auto is worse than the best named schedule on {sum(g < -1e-6 for g in gains)}, ", end="")
    print(f"at least 3 % better on {sum(g >= 3 for g in gains)}, proven optimal on {sum(g < 1e-6 for g in gaps)}; ", end="")
    print(f"mean gain {sum(gains) / count:.2f} %, mean gap to the lower bound {sum(gaps) / count:.2f} %")


if __name__ == "__main__":
    main()
