"""Which recomputation pays most: every choice of the section `recompute`, its memory and its step side by side.

    python -m pipehc.plan --config FILE --dry-run --recomputation [--memory GIB]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from pipehc.config.schema import Config, Module
from pipehc.config.strict_yaml import ConfigError

GIB = 2**30


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--recomputation", action="store_true", help="compare every choice of the section recompute instead")


def check(args: argparse.Namespace) -> None:
    """ConfigError for the flag without a dry run, and for others with it."""
    if args.recomputation and not args.dry_run:
        raise ConfigError("--recomputation: only with --dry-run")
    for name in ("ranks", "html", "costs") if args.recomputation else ():
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} {getattr(args, name)}: not with --recomputation")


def choices(config: Config) -> list[Config]:
    """The configuration with every choice of recompute.enabled, where there are hyper-connections, and of recompute.modules, where
    our layers compute; recompute.block as it is."""
    enabled = (False,) if config.residual.kind == "none" else (False, True)
    modules = get_args(Module) if config.runtime.fused else ()
    some = [chosen for size in range(len(modules) + 1) for chosen in combinations(modules, size)]
    sections = [config.recompute.model_copy(update={"enabled": one, "modules": chosen}) for one in enabled for chosen in some]
    return [config.model_copy(update={"recompute": section}) for section in sections]


def rows(configs: Sequence[Config], found: Sequence[dict[str, Any]], memory_gib: float | None) -> list[dict[str, Any]]:
    """What `summary.summary` says of `choices`, side by side: as JSON, most memory first. saved_bytes, more_ms:
    against the choice that recomputes nothing. fits: None without memory_gib."""
    result: list[dict[str, Any]] = []
    for config, one in zip(configs, found, strict=True):
        total = max(rank["total_bytes"] for rank in one["ranks"])
        result.append(
            {
                "enabled": config.recompute.enabled,
                "modules": list(config.recompute.modules),
                "total_bytes": total,
                "ms": one["step"]["ms"],
                "fits": None if memory_gib is None else total <= memory_gib * GIB,
            }
        )
    for row in result:
        row |= {"saved_bytes": result[0]["total_bytes"] - row["total_bytes"], "more_ms": row["ms"] - result[0]["ms"]}
    return sorted(result, key=lambda row: -row["total_bytes"])


def best(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest that fits."""
    return min((row for row in found if row["fits"]), key=lambda row: row["ms"], default=None)


def show(found: Sequence[dict[str, Any]], gpu: str, memory_gib: float | None, console: Console) -> None:
    console.print(f"[bold]Recomputation[/] on {gpu}: bytes are counted, times simulated, none measured.")
    table = Table(title="\nOf the fullest rank, most memory first", title_justify="left", title_style="bold", pad_edge=False)
    for k, name in enumerate(("recompute.enabled", "recompute.modules", "GiB", "step, ms", "saves GiB", "takes", "GiB for 1 %")):
        table.add_column(name, justify="left" if k < 2 else "right", no_wrap=True)
    base = found[0]["ms"] - found[0]["more_ms"]
    for row in found:
        saved, share = row["saved_bytes"] / GIB, 100 * row["more_ms"] / base
        table.add_row(
            str(row["enabled"]).lower(), f"[{', '.join(row['modules'])}]".replace("[", "\\["), f"{row['total_bytes'] / GIB:.2f}",
            f"{row['ms']:,.1f}", f"{saved:.2f}", f"{share:+.1f} %", f"{saved / share:.1f}" if share >= 0.05 else "",
        )  # fmt: skip
    console.print(table)
    if memory_gib is not None:
        fastest = best(found)
        if fastest is None:
            console.print(f"\nNone fits into {memory_gib:g} GiB.", markup=False)
        else:
            given = f"recompute.enabled={str(fastest['enabled']).lower()} recompute.modules=[{','.join(fastest['modules'])}]"
            console.print(f"\nThe fastest in {memory_gib:g} GiB: {given}", markup=False)
