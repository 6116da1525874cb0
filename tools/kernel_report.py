"""What every kernel costs, measured without a GPU: counted traffic, launches, and the compiled code's resources.

    python tools/kernel_report.py [--tokens 64] [--channels 2560] [--compile-channels 1280 ...] [--arch 80 90 100]
                                  [--only traffic|compiled|caches] [--cache-tokens 4096] [--json FILE]

Traffic comes from Triton's interpreter (traffic.py), resources from compiling ahead of time and reading the machine code. The two
need different settings of TRITON_INTERPRET, so each runs in a process of its own. Traffic counts what a launch reads more than once
as read once; `--only caches`, which takes up to an hour and runs when asked for alone, models what an H100's caches let through
(cache_model.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MINIMUM = {
    "coefficients_pre + post_res forward": 18.0,
    "coefficients_pre + post_res backward": 32.0,
    "post_res_pre forward": 14.0,
    "post_res_pre backward": 28.0,
    "RMSNorm of y, eager, forward": 2.0,
    "RMSNorm of y, eager, backward": 3.0,
}
"""Units of T*C bf16 elements for n = 4: every stream read and written once a launch, with the norm of y or without it. Fewer
launches would move less, but on an H100 took longer (forward.py, backward.py)."""


def boundary(tokens: int, channels: int, meter: type[Any], add: Callable[[str, Any], None]) -> None:
    """Runs what a boundary between two sub-layers launches, fused and not, with the norm of y and without it: `add` is given the
    name of each form and the meter that was open around it."""
    import torch

    from pipehc.kernels import coefficients_pre, post_res, post_res_pre
    from pipehc.kernels.manifolds import Birkhoff

    n = 4
    manifold = Birkhoff(iterations=2)  # iterations move no bytes
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    def parameters() -> tuple[torch.Tensor, ...]:
        return leaf(n * channels, n * n + 2 * n), leaf(3), leaf(n * n + 2 * n)

    x, f, f_next = (leaf(tokens, *shape, channels, dtype=torch.bfloat16) for shape in ((n,), (), ()))
    d_y = torch.randn(tokens, channels, generator=generator).to(torch.bfloat16)
    d_x = torch.randn(tokens, n, channels, generator=generator).to(torch.bfloat16)
    for title, norm in (("", {}), (" with norm", {"norm": leaf(channels, dtype=torch.bfloat16), "eps": 1e-6})):
        for t in (x, f, f_next):
            t.grad = None  # to add to one is not counted
        first, second, third = parameters(), parameters(), parameters()
        settings = {"manifold": manifold, **norm}
        with meter() as counted:
            y, h_post, h_res = coefficients_pre(x, *first, **settings)
            x_next = post_res(x, f, h_post, h_res)
        add(f"coefficients_pre + post_res forward{title}", counted)
        with meter() as counted:
            torch.autograd.backward([x_next, y], [d_x, d_y])
        add(f"coefficients_pre + post_res backward{title}", counted)

        # A boundary between two sub-layers: its neighbours are there, so that it gets and hands on what it would in a model.
        y, h_post, h_res = coefficients_pre(x, *second, **settings)
        with meter() as counted:
            middle, y_next, h_post, h_res = post_res_pre(x, f, h_post, h_res, *third, **settings)
        add(f"post_res_pre forward{title}", counted)
        last = post_res(middle, f_next, h_post, h_res)
        with meter() as counted:
            torch.autograd.backward([last, y_next, y], [d_x, d_y, d_y])
        # Of the whole chain's backward, the boundary owns the first four launches from a map_backward_kernel on.
        start = [launch.name for launch in counted.launches].index("map_backward_kernel")
        counted.launches, counted.operations = counted.launches[start : start + 4], []
        add(f"post_res_pre backward{title}", counted)


def count_traffic(tokens: int, channels: int) -> list[dict[str, Any]]:
    """One row per form: launches, torch operations, units read and written, and bytes of phi's shape (counted apart)."""
    import torch
    from traffic import Traffic, units

    from pipehc.kernels import forward
    from pipehc.kernels.rms_norm import rms_norm

    # Channels in as many parts as for 4096 tokens.
    forward.PROGRAMS = -(-forward.PROGRAMS // -(-4096 // forward.PROJECT_TOKENS)) * -(-tokens // forward.PROJECT_TOKENS)
    rows = []

    def row(form: str, counted: Traffic) -> None:
        everything = counted.launches + counted.operations
        read, written = units(everything, tokens, channels, phi_shaped=False)
        phi = sum(units(everything, tokens, channels, phi_shaped=True))
        rows.append(
            {
                "form": form,
                "launches": len(counted.launches),
                "torch_operations": len(counted.operations),
                "read": round(read, 2),
                "written": round(written, 2),
                "sum": round(read + written, 2),
                "minimum": MINIMUM[form.removesuffix(" with norm")],
                "phi_mib": round(phi * tokens * channels * 2 / 2**20, 2),
            }
        )

    boundary(tokens, channels, Traffic, row)
    y, weight = (torch.randn(*shape, channels).to(torch.bfloat16).requires_grad_() for shape in ((tokens,), ()))
    with Traffic() as counted:
        z = rms_norm(y, weight, 1e-6)
    row("RMSNorm of y, eager, forward", counted)
    with Traffic() as counted:
        z.backward(torch.randn(tokens, channels).to(torch.bfloat16))
    row("RMSNorm of y, eager, backward", counted)
    return rows


CACHES: dict[str, dict[str, Any]] = {
    "50 MB": {},
    "50 MB, at random": {"at_random": True},
    "25 MB": {"l2_bytes": 25 * 10**6},
}
"""Models of an H100's L2 (cache_model.py)."""
MEMORY_RATE, L2_RATE = 3.0e12, 5.5e12
"""Bytes/s, for modelled times."""


def model_caches(tokens: int, channels: int, resident: dict[str, int]) -> list[dict[str, Any]]:
    """One row per form and model of L2: units through memory and L2, phi and its gradient included, and the time of the launches,
    each that of the slower of the two. resident: by form of a kernel, how many programs a multiprocessor holds."""
    from cache_model import Caches, Device
    from programs import Recorder

    rows = []

    def row(form: str, recorded: Recorder) -> None:
        unit = 2 * tokens * channels
        for model, settings in CACHES.items():
            caches = Caches(Device(**settings))
            for launch in recorded.launches:
                caches.launch(launch.programs(), resident[form_of(launch.name, launch.arguments, resident)])
            last = caches.end()
            seconds = sum(max(m.memory / MEMORY_RATE, m.l2 / L2_RATE) for m in [*caches.moved, last])
            moved = sum(caches.moved, last)
            rows.append(
                {
                    "form": form,
                    "L2": model,
                    "launches": len(recorded.launches),
                    "memory": round(moved.memory / unit, 2),
                    "read": round(moved.memory_read / unit, 2),
                    "written": round(moved.memory_written / unit, 2),
                    "through L2": round(moved.l2 / unit, 2),
                    "modelled us": round(1e6 * seconds),
                }
            )

    boundary(tokens, channels, Recorder, row)
    return rows


def form_of(kernel: str, arguments: Mapping[str, Any], forms: Collection[str]) -> str:
    """The one among the names of compiled.forms that a launch is."""
    norm = any(arguments.get(name) is not None for name in ("norm_weight", "weight_shares"))
    follows = arguments.get({"project_kernel": "x_next", "stream_gradient_kernel": "h_post_before"}.get(kernel, "")) is not None
    (found,) = (f for f in forms if f.split()[0] == kernel and ("norm" in f) == norm and ("of post_res_pre" in f) == follows)
    return found


def resident_programs(channels: int) -> dict[str, int]:
    """Of each form, for the paper's map."""
    from cache_model import Device
    from compiled import forms, resources

    from pipehc.kernels.manifolds import Birkhoff

    found = {}
    for name, form in forms(Birkhoff()).items():
        used = resources(form, channels, 90)
        found[name] = Device().resident(used["registers"], used["shared"], form.options["num_warps"])
    return found


def compile_kernels(channels: list[int], arch: int) -> list[dict[str, Any]]:
    """One row per kernel and form at n = 4 in bf16, and per binary: Triton compiles anew only for what it specializes C on."""
    from compiled import forms, resources, specialization

    rows = []
    for name, form in forms(arch=arch).items():
        binaries: dict[Any, list[int]] = {}
        for c in channels:
            binaries.setdefault(specialization(form, {"C": c}, arch), []).append(c)
        for same in binaries.values():
            rows.append({"form": name, "arch": arch, "channels": same, **resources(form, same[0], arch)})
    return rows


def in_process(interpret: bool, arguments: list[str]) -> Any:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0", "PIPEHC_KERNELS": "triton"}
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        table = Table(*rows[0], title=title)
        for one in rows:
            table.add_row(*(str(v) for v in one.values()))
        Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--channels", type=int, default=2560)
    parser.add_argument("--compile-channels", type=int, nargs="+", default=[1280, 1920, 2560, 4096, 7168])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--cache-tokens", type=int, default=4096)
    parser.add_argument("--only", choices=["traffic", "compiled", "caches"])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--worker", choices=["traffic", "compiled", "caches", "resident"], help=argparse.SUPPRESS)
    parser.add_argument("--resident", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "resident":
        print(json.dumps(resident_programs(options.channels)))
        return
    if options.worker == "caches":
        print(json.dumps(model_caches(options.cache_tokens, options.channels, options.resident)))
        return
    if options.worker == "traffic":
        print(json.dumps(count_traffic(options.tokens, options.channels)))
        return
    if options.worker == "compiled":
        print(json.dumps([r for arch in options.arch for r in compile_kernels(options.compile_channels, arch)]))
        return
    size = ["--tokens", options.tokens, "--channels", options.channels, "--cache-tokens", options.cache_tokens]
    size = [str(v) for v in (*size, "--arch", *options.arch, "--compile-channels", *options.compile_channels)]
    report = {
        kind: [] if options.only not in (None, kind) else in_process(kind == "traffic", ["--worker", kind, *size])
        for kind in ("traffic", "compiled")
    }
    report["caches"] = []
    if options.only == "caches":
        resident = in_process(False, ["--worker", "resident", *size])
        report["caches"] = in_process(True, ["--worker", "caches", "--resident", json.dumps(resident), *size])
    show(f"Traffic at T = {options.tokens}, C = {options.channels}, n = 4, bf16, in units of T*C elements", report["traffic"])
    show("Compiled kernels", report["compiled"])
    at = f"T = {options.cache_tokens}, C = {options.channels}"
    show(f"Modelled at {at}, n = 4, bf16, through the caches of an H100, in the same units", report["caches"])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
