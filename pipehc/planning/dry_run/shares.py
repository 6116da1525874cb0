"""What the device does while a micro-batch goes through a stage and back: products, attention, hyper-connections, the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipehc.planning.dry_run.hardware import Hardware
from pipehc.planning.dry_run.kernels import OF_CONNECTIONS
from pipehc.planning.dry_run.operations import Operation
from pipehc.planning.dry_run.roofline import device_ms
from pipehc.planning.dry_run.tables import Key, NodeWork


class Shares(NamedTuple):
    """In ms of F, R, B and W together, on an idle device. connections: kernels of hyper-connections. rest: what memory decides:
    SwiGLU, copies, casts, sums, norms."""

    products: float
    attention: float
    connections: float
    rest: float


def shares(nodes: Mapping[Key, Sequence[NodeWork]], hardware: Hardware) -> dict[int, Shares]:
    """By stage."""
    totals: dict[int, Counter[str]] = {}
    for (stage, _), found in nodes.items():
        total = totals.setdefault(stage, Counter())
        for node in found:
            for operation, n in node.work.items():
                if operation.sort not in ("communication", "tensor parallel"):
                    total[_share(operation)] += n * device_ms(operation, hardware)  # type: ignore[assignment]
    return {stage: Shares(*(float(total[name]) for name in Shares._fields)) for stage, total in sorted(totals.items())}


def _share(operation: Operation) -> str:
    if operation.sort in ("matmul", "attention"):
        return "products" if operation.sort == "matmul" else "attention"
    return "connections" if operation.name.removeprefix("pipehc.") in OF_CONNECTIONS else "rest"
