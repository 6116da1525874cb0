"""Measures a hardware file for dry runs on this machine's GPU: python tools/measure_hardware.py --like h100 > mine.yaml

Matrix products, attention, memory, our kernels and launches are measured; memory size and name are read. Links need more than one
GPU: under torchrun the all-to-all of all processes is measured too, and given to `nvlink` if they share a node, else to `network`.
Everything else, peaks among it, comes from --like.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import yaml
from bench_kernels import kernels

from pipehc.config.strict_yaml import ConfigError
from pipehc.planning.dry_run.hardware import load_hardware


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Of one call, on the device."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeats


def matmul_flops() -> float:
    """FLOP/s at sizes of an expert and of a projection, bf16: the mean over both kinds."""
    rates = []
    for m, k, n in ((4096, 2560, 3072), (4096, 2560, 6144), (2731, 2560, 3072)):
        a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        rates.append(2 * m * k * n / seconds(lambda a=a, b=b: a @ b))  # type: ignore[misc]
    return sum(rates) / len(rates)


def attention_flops(heads: int = 32, length: int = 4096) -> float:
    """FLOP/s of causal attention whose keys are 192 and values 128 wide, forward and backward; the masked half is not counted."""
    q, k = (torch.randn(1, heads, length, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    v = torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def both() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.backward(out)

    forward = 2 * heads * length * length * (192 + 128) / 2
    return 3.5 * forward / seconds(both)


def memory_rate() -> float:
    """Bytes/s of adding two tensors of 256 MiB."""
    a, b = (torch.randn(2**27, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 3 * a.numel() * 2 / seconds(lambda: torch.add(a, b, out=out))


def launch_us() -> float:
    """Of the host, for an operation that autograd records: its forward and its backward are two launches."""
    x = torch.ones(8, device="cuda", requires_grad=True)
    count = 2000
    torch.cuda.synchronize()
    began, y = time.perf_counter(), x
    for _ in range(count):
        y = y * 1.0
    y.sum().backward()
    used = time.perf_counter() - began
    torch.cuda.synchronize()
    return 1e6 * used / (2 * count)


def kernel_rates() -> dict[str, float]:
    """Bytes/s of our kernels by name, as the trainer runs them: with the norm, in bf16; of several launches the mean."""
    us: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for row in kernels(tokens=4096, n=4, channels=2560, norm=True):
        us[row["kernel"]] += row["us"]
        moved[row["kernel"]] += row["bytes"]
    return {name: 1e6 * moved[name] / us[name] for name in us}


def all_to_all() -> tuple[float, float]:
    """(bytes/s that leave a GPU, us of a tiny one)."""
    world = dist.get_world_size()
    big, tiny = (torch.zeros(n * world, device="cuda", dtype=torch.bfloat16) for n in (2**24, 8))

    def exchange(x: torch.Tensor) -> float:
        out = torch.empty_like(x)
        return seconds(lambda: dist.all_to_all_single(out, x))

    return big.numel() * 2 * (world - 1) / world / exchange(big), 1e6 * exchange(tiny)


def measured(like: str) -> dict[str, Any]:
    """The contents of a hardware file. Raises ConfigError for a --like that is none."""
    found = load_hardware(like).model_dump()
    found["name"] = torch.cuda.get_device_name()
    found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    found["matmul"]["efficiency"] = _share(matmul_flops(), 1e12 * found["matmul"]["bf16_tflops"])
    found["attention"]["efficiency"] = _share(attention_flops(), 1e12 * found["attention"]["bf16_tflops"])
    memory = memory_rate()
    found["memory"]["efficiency"] = _share(memory, 1e9 * found["memory"]["gb_per_s"])
    found["kernels"] = {name: round(rate / memory, 3) for name, rate in kernel_rates().items()}
    found["launch_us"] = round(launch_us(), 1)
    if dist.is_initialized():
        rate, latency = all_to_all()
        link = "nvlink" if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] else "network"
        found[link] |= {"efficiency": _share(rate, 1e9 * found[link]["gb_per_s"]), "latency_us": round(latency, 1)}
    return found


def _share(rate: float, peak: float) -> float:
    if rate > peak:
        raise ConfigError(f"measured {rate:.3g}, which is more than the peak of --like, {peak:.3g}: name the file of this GPU")
    return round(rate / peak, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="h100", help="a shipped hardware file, or one's own, with the peaks of this GPU")
    args = parser.parse_args()
    try:
        load_hardware(args.like)
        if not torch.cuda.is_available():
            raise ConfigError("no CUDA device here: nothing to measure")
        if "RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl")
        found = measured(args.like)
    except ConfigError as error:
        print(f"measure_hardware: {str(error).replace('--gpu', '--like')}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(yaml.safe_dump(found, sort_keys=False), end="")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
