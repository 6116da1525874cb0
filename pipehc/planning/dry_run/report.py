"""A dry run as tables for a terminal of 100 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pipehc.planning.dry_run.peaks import CATEGORIES

GIB = 2**30


def show(summary: dict[str, Any], plain: dict[str, Any] | None, console: Console) -> None:
    """Prints what `summary.summary` returns. plain: the same with the plain residual, for comparison."""
    console.print(
        f"[bold]Dry run[/] on {summary['gpu']}: counted by running the program without data; every time is modelled or simulated, "
        f"none measured. {summary['schedule']}, {summary['microbatches']} micro-batches ({summary['microbatches_run']} were run), "
        f"{summary['processes']} processes, residual {summary['residual']}."
    )
    _memory(summary, console)
    _actions(summary, console)
    _shares(summary, console)
    _operations(summary, console)
    if summary["step"] is None:
        console.print("\nThe step is not simulated: the ranks that were run do not hold all stages. Leave out --ranks.")
    else:
        _step(summary, console)
    if plain is not None:
        _comparison(summary, plain, console)
    for text in summary["warnings"]:
        console.print()
        console.print(f"warning: {text}", markup=False, style="yellow")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 else "right")
    return table


def _memory(summary: dict[str, Any], console: Console) -> None:
    ranks = summary["ranks"]
    names = [f"{r['rank']}" if r["mirror"] is None else f"{r['rank']}, {r['mirror']}" for r in ranks]
    for at in range(0, len(ranks), 8):
        some = ranks[at : at + 8]
        table = _table("\nPeak memory in GiB, by rank" if not at else "", "", *names[at : at + 8])
        table.add_row("stages", *(", ".join(map(str, r["stages"])) for r in some))
        for category in CATEGORIES:
            if any(r["bytes"].get(category, 0) >= 0.005 * GIB for r in ranks) or max(r["peak_bytes"] for r in ranks) < GIB:
                table.add_row(category, *(_gib(r["bytes"].get(category, 0)) for r in some))
        table.add_row("counted", *(f"[bold]{_gib(r['peak_bytes'])}[/]" for r in some), end_section=True)
        for name, words in (("context", "CUDA, estimated"), ("groups", "NCCL, estimated"), ("allocator", "allocator, estimated")):
            table.add_row(words, *(_gib(r["estimated_bytes"][name]) for r in some))
        table.add_row("in all", *(f"[bold]{_gib(r['total_bytes'])}[/]" for r in some))
        table.add_row("at", *(r["at"] for r in some))
        console.print(table)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.1 * GIB else f"{size / GIB:.4f}" if size else ""


def _actions(summary: dict[str, Any], console: Console) -> None:
    cut = any(a["tensor_parallel_bytes"] for a in summary["actions"])
    table = _table(
        "\nActions, for one micro-batch (B: gradient of the input alone)",
        "stage", "action", "TFLOP", "GB", "launches", "all-to-all MB", *(["tp MB"] if cut else []), "roofline ms", "host ms",
        "all-to-all ms", *(["tp ms"] if cut else []),
    )  # fmt: skip
    shown: dict[tuple[Any, ...], list[int]] = {}
    for a in summary["actions"]:
        shown.setdefault(
            (
                a["action"],
                f"{a['flops'] / 1e12:.3f}",
                f"{a['bytes'] / 1e9:.2f}",
                f"{a['launches']:.0f}",
                f"{a['all_to_all_bytes'] / 1e6:.0f}",
                *([f"{a['tensor_parallel_bytes'] / 1e6:.0f}"] if cut else []),
                f"{a['device_ms']:.2f}",
                f"{a['host_ms']:.2f}",
                f"{a['all_to_all_ms']:.2f}",
                *([f"{a['tensor_parallel_ms']:.2f}"] if cut else []),
            ),
            [],
        ).append(a["stage"])
    for row, stages in sorted(shown.items(), key=lambda item: (item[1][0], "FRBW".index(item[0][0]))):
        table.add_row(_spans(stages), *row)
    console.print(table)


def _shares(summary: dict[str, Any], console: Console) -> None:
    table = _table(
        "\nWhat a stage's device does for one micro-batch, F + R + B + W, roofline ms",
        "stage", "products", "attention", "hyper-connections", "rest", "in all",
    )  # fmt: skip
    shown: dict[tuple[str, ...], list[int]] = {}
    for found in summary["shares"]:
        parts = [found[name] for name in ("products", "attention", "connections", "rest")]
        shown.setdefault(tuple(f"{ms:.2f}" for ms in (*parts, sum(parts))), []).append(found["stage"])
    for row, stages in shown.items():
        table.add_row(_spans(stages), *row)
    console.print(table)


def _spans(numbers: list[int]) -> str:
    """0, 3-5"""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][-1] == n - 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _operations(summary: dict[str, Any], console: Console) -> None:
    found = summary["operations"]
    table = _table(
        f"\nOperations of rank {found[0]['rank']} that cost most in a step", "", "launches", "TFLOP", "GB", "roofline ms", "share"
    )
    for o in found:
        name = o["operation"].removeprefix("aten.")
        row = f"{o['launches']:,.0f}", f"{o['flops'] / 1e12:.1f}", f"{o['bytes'] / 1e9:.0f}", f"{o['device_ms']:.1f}"
        table.add_row(name, *row, f"{100 * o['share']:.1f} %")
    console.print(table)


_STEP = (
    ("step, simulated", lambda s: f"{s['ms']:,.1f} ms"),
    ("tokens", lambda s: f"{s['tokens_per_s']:,.0f} a second"),
    ("model FLOPs utilisation", lambda s: f"{100 * s['model_flops_utilisation']:.1f} %"),
    ("bubble", lambda s: f"{s['bubble_ms']:,.1f} ms ({100 * s['bubble']:.1f} %)"),
    ("exposed stage messages", lambda s: f"{s['exposed_messages_ms']:,.1f} ms"),
    ("exposed all-to-alls", lambda s: f"{s['exposed_all_to_alls_ms']:,.1f} ms"),
    ("hidden recomputation", lambda s: f"{s['hidden_recomputation_ms']:,.1f} ms"),
    ("a stage message on its link", lambda s: f"{s['message_ms']:.2f} ms"),
    ("optimizer, after the pipeline", lambda s: f"{s['optimizer_ms']:,.1f} ms"),
    ("sums of gradients", lambda s: f"{s['gradient_sums_ms']:,.1f} ms, exposed {s['exposed_gradient_sums_ms']:,.1f} ms"),
)


def _step(summary: dict[str, Any], console: Console) -> None:
    table = _table("\nThe step", "", "")
    table.show_header = False
    for name, words in _STEP:
        table.add_row(name, words(summary["step"]))
    console.print(table)


def _comparison(summary: dict[str, Any], plain: dict[str, Any], console: Console) -> None:
    table = _table("\nWhat the residual costs", "", summary["residual"], plain["residual"], "difference")
    fullest = [max(r["total_bytes"] for r in found["ranks"]) / GIB for found in (summary, plain)]
    table.add_row("memory of the fullest rank, GiB", *_difference(fullest[0], fullest[1], ".2f"))
    if summary["step"] is not None and plain["step"] is not None:
        for name, key, scale, form in (
            ("step, simulated, ms", "ms", 1.0, ",.1f"),
            ("tokens a second", "tokens_per_s", 1.0, ",.0f"),
            ("exposed stage messages, ms", "exposed_messages_ms", 1.0, ",.1f"),
            ("model FLOPs utilisation, %", "model_flops_utilisation", 100.0, ".1f"),
        ):
            table.add_row(name, *_difference(scale * summary["step"][key], scale * plain["step"][key], form))
    console.print(table)


def _difference(ours: float, plain: float, form: str) -> tuple[str, str, str]:
    share = f" ({100 * (ours - plain) / plain:+.1f} %)" if plain else ""
    return format(ours, form), format(plain, form), format(ours - plain, "+" + form) + share
