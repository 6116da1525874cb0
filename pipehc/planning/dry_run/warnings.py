"""What a summary should make its reader worry about, in words."""

from __future__ import annotations

from typing import Any

from pipehc.planning.dry_run.hardware import Hardware

GIB = 2**30


def warnings(summary: dict[str, Any], hardware: Hardware) -> list[str]:
    """One sentence each; none if all is well."""
    return [*_memory(summary, hardware), *_host(summary), *_links(summary)]


def _memory(summary: dict[str, Any], hardware: Hardware) -> list[str]:
    over = [rank for rank in summary["ranks"] if not rank["fits"]]
    if not over:
        return []
    worst = max(over, key=lambda rank: rank["total_bytes"])
    largest = max(worst["bytes"], key=lambda name: worst["bytes"][name])
    return [
        f"does not fit: rank {worst['rank']} needs {worst['total_bytes'] / GIB:.1f} GiB of {hardware.memory_gib:g} GiB, most "
        f"of it {largest} ({worst['bytes'][largest] / GIB:.1f} GiB); {len(over)} of the {len(summary['ranks'])} "
        "ranks that were run do not fit"
    ]


def _host(summary: dict[str, Any]) -> list[str]:
    slow = [a for a in summary["actions"] if a["action"] in "FBW" and a["host_ms"] > a["device_ms"]]
    if not slow:
        return []
    worst = max(slow, key=lambda a: a["host_ms"] - a["device_ms"])
    return [
        f"host-bound: {worst['action']} of stage {worst['stage']} keeps the host {worst['host_ms']:.1f} ms for its "
        f"{worst['launches']:.0f} launches and the device {worst['device_ms']:.1f} ms; so in {len(slow)} of the actions: a larger "
        "micro-batch would help"
    ]


def _links(summary: dict[str, Any]) -> list[str]:
    found, step = [], summary["step"]
    by_stage: dict[int, dict[str, dict[str, float]]] = {}
    for a in summary["actions"]:
        by_stage.setdefault(a["stage"], {})[a["action"]] = a
    if step is not None:
        shortest = min(min(a["F"]["device_ms"], a["B"]["device_ms"]) for a in by_stage.values())
        if step["message_ms"] > shortest:
            found.append(
                f"link-bound: a stage message holds its link for {step['message_ms']:.1f} ms, and the shortest action of a stage "
                f"takes {shortest:.1f} ms"
            )
    exchange, stage = max((a["F"]["all_to_all_ms"] + a["B"]["all_to_all_ms"], s) for s, a in by_stage.items())
    compute = sum(by_stage[stage][kind]["device_ms"] for kind in "FBW")
    if exchange > compute:
        found.append(
            f"link-bound: the all-to-alls of F and B of stage {stage} take {exchange:.1f} ms, and its computation only "
            f"{compute:.1f} ms: no pair can hide them"
        )
    return found
