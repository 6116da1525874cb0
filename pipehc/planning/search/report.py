"""What a search found, as tables for a terminal of 100 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


def show(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"[bold]Layouts[/] over {found['gpus']} GPUs with {found['memory_gib']:g} GiB ({found['gpu']}): {found['considered']} were "
        f"considered, in {found['seconds']:.0f} s. Bytes are counted, times simulated, none measured: 'dry run' of the whole "
        "layout (with auto: of its fullest rank), 'composed' from dry runs of models of a few blocks."
    )
    _table("\nThose that fit, fastest first", found["layouts"], console, "from", lambda row: row["source"])
    if found["rejected"]:
        title = "\nFaster, but they do not fit"
        _table(title, found["rejected"], console, "why not", lambda row: row["why"])
    if found["own"] is not None:
        _table("\nThe configuration's own", [found["own"]], console, "from", lambda row: row["source"])
    best = found["layouts"][0]
    console.print(f"\nBlocks per stage of the first: {', '.join(map(str, best['blocks_per_stage']))}.", markup=False)


def _table(title: str, rows: list[dict[str, Any]], console: Console, last: str, words: Any) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    cut = ["tp"] if rows[0]["tp"] > 1 else []
    for name in ("schedule", "pp", *cut, "ep", "dp", "micro-batch", "recompute", "blocks"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    for name in ("GiB", "ms", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(last)
    for row in rows:
        table.add_row(
            _schedule(row), *(str(row[name]) for name in ("pp", *cut, "ep", "dp", "micro_batch")), _recompute(row),
            _blocks(row["blocks_per_stage"]), f"{row['total_bytes'] / GIB:.1f}",
            "" if row["ms"] is None else f"{row['ms']:,.0f}" if row["ms"] >= 1000 else f"{row['ms']:.1f}",
            "" if not row["model_flops_utilisation"] else f"{100 * row['model_flops_utilisation']:.1f} %", words(row),
        )  # fmt: skip
    console.print(table)


def _schedule(row: dict[str, Any]) -> str:
    if row["schedule"] == "auto":
        return f"auto ({row['placement']})"
    return row["schedule"] if row["chunks"] is None else f"{row['schedule']} x {row['chunks']}"


def _recompute(row: dict[str, Any]) -> str:
    if not row["recompute"]:
        return "off"
    return "stage" if row["recompute_block"] is None else str(row["recompute_block"])


def _blocks(sizes: list[int]) -> str:
    """3,4x6,3"""
    parts: list[list[int]] = []
    for size in sizes:
        if parts and parts[-1][0] == size:
            parts[-1][1] += 1
        else:
            parts.append([size, 1])
    return ",".join(str(size) if n == 1 else f"{size}x{n}" for size, n in parts)
