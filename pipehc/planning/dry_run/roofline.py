"""From counts to times: every operation at the rate of its class, or as fast as the memory gives and takes its bytes; our kernels
as fast as they were measured."""

from __future__ import annotations

from typing import NamedTuple

from pipehc.planning.dry_run.hardware import Hardware, Link
from pipehc.planning.dry_run.operations import Operation
from pipehc.planning.dry_run.tables import Work


class Cost(NamedTuple):
    """Of a piece of work. device_ms: modelled. host_ms: what the host needs to launch it. exchanged: bytes that this rank gives to
    all-to-alls, and exchange_ms how long they take. shared, share_ms: of the gathers and sums of tensor parallelism."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    device_ms: float = 0.0
    host_ms: float = 0.0
    exchanged: float = 0.0
    exchange_ms: float = 0.0
    products: float = 0.0
    shared: float = 0.0
    share_ms: float = 0.0

    def plus(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other)))

    @property
    def ms(self) -> float:
        """How long it keeps its queue: what is slower, the device or the host that launches for it, and what it waits for."""
        return max(self.device_ms, self.host_ms) + self.exchange_ms + self.share_ms


def device_ms(operation: Operation, hardware: Hardware) -> float:
    """One launch on an idle device."""
    seconds = operation.bytes / hardware.memory.rate / hardware.kernels.get(operation.name.removeprefix("pipehc."), 1.0)
    if operation.sort in ("matmul", "attention"):
        products = hardware.matmul if operation.sort == "matmul" else hardware.attention
        seconds = max(seconds, operation.flops / products.rate(operation.half))
    elif operation.flops:
        seconds = max(seconds, operation.flops / hardware.matmul.rate(half=False))
    return 1e3 * seconds


def cost(work: Work, hardware: Hardware, experts: int) -> Cost:
    """The cost of work whose all-to-alls join `experts` neighbouring processes: of what each gives, one part stays where it is.

    Other collectives are left out: see `collectives`.
    """
    link, total = hardware.link(experts), Cost()
    for operation, n in work.items():
        if operation.name == _ALL_TO_ALL:
            total = total.plus(Cost(exchanged=n * operation.bytes, exchange_ms=n * _transfer_ms(operation.bytes, experts, link)))
        elif operation.sort == "tensor parallel":
            ms = n * _collective_ms(operation, 0, hardware.link(operation.processes))
            total = total.plus(Cost(shared=n * operation.bytes, share_ms=ms))
        elif operation.sort != "communication":
            ms, host = device_ms(operation, hardware), 1e-3 * hardware.launch_us
            products = n * operation.flops if operation.sort in ("matmul", "attention") else 0.0
            total = total.plus(Cost(n * operation.flops, n * operation.bytes, n, n * ms, n * host, products=products))
    return total


def collectives(work: Work, processes: int, link: Link) -> tuple[float, float]:
    """(bytes, ms) of the sums and gathers over the replicas of a stage; sends and receives of stage messages are not among them.
    processes: of those that do not say how many they join."""
    own = {o: n for o, n in work.items() if o.sort == "communication" and o.name not in (_ALL_TO_ALL, "c10d.send", "c10d.recv_")}
    return (
        sum(n * operation.bytes for operation, n in own.items()),
        sum(n * _collective_ms(o, processes, link) for o, n in own.items()),
    )


_ALL_TO_ALL = "c10d.alltoall_base_"
_SUMS = ("c10d.allreduce_", "c10d.allreduce_coalesced_")


def _collective_ms(operation: Operation, processes: int, link: Link) -> float:
    """Around a ring: a sum that everyone gets is a scattered one and a gather, so it takes twice as long."""
    return (2 if operation.name in _SUMS else 1) * _transfer_ms(operation.bytes, operation.processes or processes, link)


def _transfer_ms(moved: float, processes: int, link: Link) -> float:
    return 1e3 * moved * (processes - 1) / processes / link.rate + 1e-3 * link.latency_us if processes > 1 else 0.0
