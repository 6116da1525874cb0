"""Times the kernels on a GPU against eager PyTorch, torch.compile and, where installed, Liger-Kernel.

    python tools/bench_kernels.py [--tokens 4096] [--channels 1280 2560] [--streams 4] [--json FILE]

Reports microseconds per forward + backward of one sub-layer's operations (branch left out), the bandwidth that its least traffic in
that time amounts to, and which fraction of the device's copy bandwidth that is; and how long every kernel of a boundary between two
sub-layers takes, without and with the norm of y, which `tools/measure_hardware.py` writes, against the memory's rate, into a
hardware file. Without a GPU it says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipehc.kernels import coefficients_pre, post_res, post_res_pre
from pipehc.kernels.kept_maps import KeptMaps
from pipehc.kernels.language import noting
from pipehc.kernels.manifolds import Birkhoff
from pipehc.planning.dry_run import operations

UNITS = {"forward": lambda n: 3 * n + 2, "forward + backward": lambda n: 7 * n + 5}
"""Least traffic in units of T*C elements with pre and post_res apart: 14 forward, 19 backward at n = 4."""


def milliseconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of one call, L2 flushed before each."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for i in range(repeats + 5):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy."""
    source = torch.empty(2**29, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) / 1e3)


def sublayer(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    y, h_post, h_res = coefficients_pre(x, phi, alpha, bias, manifold=Birkhoff())
    return post_res(x, y, h_post, h_res)


def candidates() -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Name -> (value of PIPEHC_KERNELS, function)."""
    found = {
        "triton": ("triton", sublayer),
        "eager": ("reference", sublayer),
        "torch.compile": ("reference", torch.compile(sublayer, dynamic=False)),
    }
    if importlib.util.find_spec("liger_kernel") is not None and importlib.util.find_spec("liger_kernel.ops.mhc") is not None:
        from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre

        def liger(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
            h_pre, h_post, h_res = liger_mhc_coeffs(x, phi, bias, *alpha.unbind())
            return liger_mhc_post_res(x, liger_mhc_pre(x, h_pre), h_post, h_res)

        found["Liger-Kernel"] = ("reference", liger)
    return found


def bench(tokens: int, n: int, channels: int, bandwidth: float) -> list[dict[str, Any]]:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype).requires_grad_()

    x = leaf(tokens, n, channels, dtype=torch.bfloat16)
    parameters = leaf(n * channels, n * n + 2 * n), leaf(3), leaf(n * n + 2 * n)
    grad = torch.randn_like(x)
    rows = []
    for name, (backend, function) in candidates().items():
        os.environ["PIPEHC_KERNELS"] = backend

        def forward(function: Callable[..., Tensor] = function) -> Tensor:
            with torch.no_grad():
                return function(x, *parameters)

        def both(function: Callable[..., Tensor] = function) -> None:
            torch.autograd.grad(function(x, *parameters), (x, *parameters), grad)

        for what, run in (("forward", forward), ("forward + backward", both)):
            try:
                elapsed = milliseconds(run)
            except Exception as error:  # a rival that does not run is a line of the table, not the end of it
                rows.append({"C": channels, "what": what, "how": name, "us": f"{type(error).__name__}: {error}"[:60]})
                continue
            rate = UNITS[what](n) * tokens * channels * 2 / (elapsed / 1e3)
            rows.append(
                {
                    "C": channels,
                    "what": what,
                    "how": name,
                    "us": round(elapsed * 1e3, 1),
                    "GB/s of least traffic": round(rate / 1e9),
                    "of copy": f"{rate / bandwidth:.0%}",
                }
            )
    return rows


def boundary(tokens: int, n: int, channels: int, norm: bool, device: str = "cuda") -> Callable[[], None]:
    """What runs coefficients_pre and post_res_pre, rebuilds them, and runs post_res and the backward of all, in bf16: the first
    backward of each kind is post_res_pre's. On `meta` tensors nothing is computed."""
    generator = torch.Generator(device="cpu" if device == "meta" else device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, device=device) if device == "meta" else torch.randn(*shape, generator=generator, device=device)

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return (scale * random(*shape)).to(dtype).requires_grad_()

    def parameters() -> tuple[Tensor, ...]:
        columns = n * n + 2 * n
        fp32 = torch.float32
        return leaf(n * channels, columns, dtype=fp32, scale=0.02), leaf(3, dtype=fp32), leaf(columns, dtype=fp32)

    x, f, f_next, weight = leaf(tokens, n, channels), leaf(tokens, channels), leaf(tokens, channels), leaf(channels)
    first, second = parameters(), parameters()
    settings: dict[str, Any] = {"manifold": Birkhoff()} | ({"norm": weight, "eps": 1e-6} if norm else {})
    d_x, d_y = random(*x.shape).to(x.dtype), random(*f.shape).to(x.dtype)

    def ahead() -> tuple[Tensor, ...]:
        y, h_post, h_res = coefficients_pre(x, *first, **settings)
        return y, *post_res_pre(x, f, h_post, h_res, *second, **settings)

    def chain() -> None:
        maps = KeptMaps()
        with maps, torch.no_grad():
            ahead()
        with maps:
            y, middle, y_next, h_post, h_res = ahead()
        last = post_res(middle, f_next, h_post, h_res)
        torch.autograd.grad([last, y, y_next], [x, f, f_next, *first, *second, *([weight] if norm else [])], [d_x, d_y, d_y])

    return chain


def counted(chain: Callable[[], None]) -> list[tuple[str, int]]:
    """(name, bytes as a dry run counts them) of every kernel of a boundary, in order."""
    found = []

    def note(name: str, args: Mapping[str, Any]) -> AbstractContextManager[object]:
        found.append((name, operations.kernel(name, args).bytes))
        return nullcontext()

    with noting(note):
        chain()
    return found


def kernels(tokens: int, n: int, channels: int, norm: bool, repeats: int = 9) -> list[dict[str, Any]]:
    """Median device time of every kernel of a boundary, and the bytes that a dry run counts for it."""
    os.environ["PIPEHC_KERNELS"] = "triton"
    chain = boundary(tokens, n, channels, norm)
    launches = counted(chain)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            chain()
        torch.cuda.synchronize()
    ours = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA and e.name.endswith("_kernel")]
    ours.sort(key=lambda e: e.time_range.start)
    found = []
    for k, (name, nbytes) in enumerate(launches):
        of_launch = ours[k :: len(launches)]
        assert {e.name for e in of_launch} == {name}, (name, {e.name for e in of_launch})
        us = round(sorted(e.device_time for e in of_launch)[repeats // 2], 1)
        found.append({"C": channels, "norm": norm, "kernel": name, "us": us, "bytes": nbytes, "GB/s": round(1e-3 * nbytes / us)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--channels", type=int, nargs="+", default=[1280, 1920, 2560])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing to time (tools/kernel_report.py counts traffic and compiled resources without one)")
        return
    bandwidth = copy_bandwidth()
    rows = [row for c in options.channels for row in bench(options.tokens, options.streams, c, bandwidth)]
    columns = ["C", "what", "how", "us", "GB/s of least traffic", "of copy"]
    table = Table(*columns, title=f"T = {options.tokens}, n = {options.streams}, bf16; copy {bandwidth / 1e9:.0f} GB/s")
    for row in rows:
        table.add_row(*(str(row.get(c, "")) for c in columns))
    Console(width=160).print(table)
    apart = [row for c in options.channels for norm in (False, True) for row in kernels(options.tokens, options.streams, c, norm)]
    columns = ["C", "norm", "kernel", "us", "bytes", "GB/s"]
    table = Table(*columns, title="kernels of a boundary, in the order in which they run; bytes as a dry run counts them")
    for row in apart:
        table.add_row(*map(str, row.values()))
    Console(width=160).print(table)
    if options.json:
        found = {"copy GB/s": round(bandwidth / 1e9), "tokens": options.tokens, "rows": rows, "kernels": apart}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
