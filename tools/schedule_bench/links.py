"""Rate-limited links: a network namespace per rank, joined by a bridge; each rank shapes what it sends, apart for every target."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

# An Ethernet frame of 1514 bytes carries 1448 of TCP payload.
_FRAMING = 1514 / 1448


def unavailable() -> str | None:
    """Why links cannot be limited here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (package iproute2)"
    return None


@contextmanager
def limited_links(ranks: int, message_bytes: int, milliseconds: float) -> Iterator[list[str]]:
    """Makes one namespace a rank and yields their names; rank r has the address `address(r)` on eth0.

    A message of `message_bytes` holds the link from one rank to another for `milliseconds`, undisturbed by other messages.
    Raises OSError with what the tool said if the kernel refuses.
    """
    tag = f"phc{os.getpid() % 10000}_"
    names, switch = [f"{tag}{rank}" for rank in range(ranks)], f"{tag}s"
    bits_per_s = round(message_bytes * 8 * _FRAMING / (milliseconds / 1000))
    try:
        _run(f"ip netns add {switch}", f"ip -n {switch} link add br0 type bridge", f"ip -n {switch} link set br0 up")
        for rank, name in enumerate(names):
            _run(
                f"ip netns add {name}",
                f"ip -n {name} link set lo up",
                f"ip -n {switch} link add p{rank} type veth peer name eth0 netns {name}",
                f"ip -n {switch} link set p{rank} master br0 up",
                f"ip -n {name} addr add {address(rank)}/24 dev eth0",
                f"ip -n {name} link set eth0 up",
            )
            _shape(name, rank, ranks, bits_per_s)
        yield names
    finally:
        for name in [*names, switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def _shape(name: str, rank: int, ranks: int, bits_per_s: int) -> None:
    tc = f"ip netns exec {name} tc"
    _run(f"{tc} qdisc add dev eth0 root handle 1: htb default 1")
    _run(f"{tc} class add dev eth0 parent 1: classid 1:1 htb rate 80gbit quantum 65536")
    for target in set(range(ranks)) - {rank}:
        flow = f"1:{10 + target:x}"
        limits = f"rate {bits_per_s} burst 256k cburst 256k quantum 65536"
        _run(
            f"{tc} class add dev eth0 parent 1: classid {flow} htb {limits}",
            f"{tc} filter add dev eth0 parent 1: protocol ip u32 match ip dst {address(target)}/32 flowid {flow}",
        )


def _run(*commands: str) -> None:
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{command}: {done.stderr.strip()}")
