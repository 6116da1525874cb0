"""Compiles the kernels ahead of time, without a GPU, and reads registers, spills and instructions from the machine code."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from pipehc.kernels.forward import map_constants
from pipehc.kernels.manifolds import Birkhoff, Harmonized, Hybrid, IdentityOffset, Isometric, Manifold
from pipehc.kernels.projection import factors_in_registers, padded_columns
from pipehc.kernels.tiles import block_channels, max_registers, row_channels

STREAMS = {"x", "f", "x_next", "y", "d_x", "d_f", "d_y", "d_x_next", "d_x_direct", "d_f_before", "norm_weight", "d_weight"}
INTEGERS = {"T", "C", "TILES", "STREAMS", "SPLITS", "STEPS", "PHI_PARTS", "SMALL_PARTS", "WEIGHT_PARTS", "SIZE"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


WITHOUT_NORM = dict.fromkeys(("norm_weight", "norms", "pulls", "weight_shares"))


@dataclass
class Form:
    """One use of a kernel: its compile-time arguments, and launch options."""

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})


def forms(manifold: Manifold | None = None, n: int = 4, arch: int = 90) -> dict[str, Form]:
    """The kernels of all operations at n streams, as the wrappers launch them, without and with the norm of y. manifold: of the
    maps; None: every one. arch: compute capability times ten."""
    names = ("forward", "backward", "pre", "post_res", "rebuild")
    modules = {name: importlib.import_module(f"pipehc.kernels.{name}") for name in names}
    forward, backward = modules["forward"], modules["backward"]
    block, most = {"n": n, "BT": 16, "BC": block_channels(n)}, {"maxnreg": max_registers(n)}
    found = {}
    for module, name in [
        ("pre", "pre_kernel"),
        ("pre", "pre_backward_kernel"),
        ("post_res", "post_res_kernel"),
        ("post_res", "post_res_backward_kernel"),
    ]:
        found[name] = Form(getattr(modules[module], name), dict(block))
    alone = dict.fromkeys(("f", "h_post", "h_res", "x_next"))
    for of, sources in (("", alone), (" of post_res_pre", {})):
        for title, norm in (("", dict.fromkeys(("norm_weight", "norms"))), (" with norm", {})):
            found[f"rebuild_kernel{of}{title}"] = Form(modules["rebuild"].rebuild_kernel, block | sources | norm)
    sums = backward.parameter_sum_kernel, {"n": n, "BLOCK": 128}
    found["parameter_sum_kernel"] = Form(sums[0], sums[1] | {"weight_shares": None, "d_weight": None})
    found["parameter_sum_kernel with norm"] = Form(*sums)
    number = torch.tensor(0.5)
    every = (Birkhoff(), Isometric(), Hybrid(number), IdentityOffset(), Harmonized(number))
    for kind in (manifold,) if manifold is not None else every:
        name, shared = type(kind).__name__, {"n": n, "PER_STREAM": kind.per_stream}
        maps = shared | map_constants(kind, ()) | ({"scalar": None, "d_scalar": None} if kind.scalar is None else {})
        to, back = kind.device_functions
        ahead = maps | _rows(n, forward.MAP_TOKENS) | {"MAP": to, "NORM_EPS": 1e-20}
        behind = maps | _rows(n, backward.MAP_TOKENS) | {"MAP_BACKWARD": back, "d_pre": None, "d_post": None, "d_res": None}
        for title, norm in ((name, WITHOUT_NORM), (f"with norm {name}", {})):
            found[f"map_kernel {title}"] = Form(forward.map_kernel, ahead | norm, {"num_warps": 4, **most})
            found[f"map_backward_kernel {title}"] = Form(backward.map_backward_kernel, behind | norm, {"num_warps": 4, **most})
        products = shared | {"PADDED": padded_columns(n, kind.per_stream), "PRECISION": "tf32"}
        streams = "streams apart" if kind.per_stream else "all streams"
        if f"phi_gradient_kernel {streams}" in found:
            continue  # the maps are not in them
        factors = factors_in_registers(arch // 10)
        options, own = {"num_warps": 4, "num_stages": 1}, {"maxnreg": max_registers(n, factors)}
        slab = products | {"BT": backward.PHI_TOKENS, "BC": backward.PHI_CHANNELS}
        found[f"phi_gradient_kernel {streams}"] = Form(backward.phi_gradient_kernel, slab, options)
        products["FENCE"] = True
        tile = products | {"BT": forward.project_tokens(kind.per_stream), "BC": block_channels(n)}
        found[f"project_kernel {streams}"] = Form(forward.project_kernel, tile | alone, options | own)
        found[f"project_kernel of post_res_pre {streams}"] = Form(forward.project_kernel, tile, options | own)
        each, warps = backward.gradient_tile(factors)
        tile = products | {"BT": each, "BC": block_channels(n) // 2, "d_x_direct": None}
        unlinked = dict.fromkeys(("h_post_before", "d_f_before"))
        for title, norm in ((streams, WITHOUT_NORM), (f"with norm {streams}", {})):
            of, options = (backward.stream_gradient_kernel, tile | norm), {"num_warps": warps, **own}
            found[f"stream_gradient_kernel {title}"] = Form(of[0], of[1] | unlinked, options)
            found[f"stream_gradient_kernel of post_res_pre {title}"] = Form(*of, options)
    return found


def _rows(n: int, tokens: int) -> dict[str, int]:
    return {"BT": tokens, "BC": row_channels(n, tokens)}


def specialization(form: Form, values: dict[str, Any], arch: int) -> tuple[Any, ...]:
    """What Triton compiles anew for when the kernel is launched with these run-time arguments, in order, apart from constants."""
    parameters, backend = form.kernel.params, make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(form.kernel.signature, parameters, backend)
    _, found, _ = bind(*(form.constants.get(p.name, values.get(p.name)) for p in parameters))
    return tuple(one for p, one in zip(parameters, found) if p.name in values)


def resources(form: Form, channels: int, arch: int, streams: str = "bf16") -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, widths in bits of global accesses, and matrix instructions.

    streams: Triton's name for the dtype of the streams.
    """
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(form.kernel.arg_names):
        if name in form.constants:
            signature[name], constants[(i,)] = "constexpr", form.constants[name]
        elif name in INTEGERS:
            signature[name] = "i32"
            if name in ("C", "SIZE"):
                kind, key = specialization(form, {name: channels}, arch)[0]
                if kind == "constexpr":
                    signature[name], constants[(i,)] = kind, key
                elif key == "D":
                    attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = f"*{streams}" if name in STREAMS else "*fp32"
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=form.kernel, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=form.options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(binary))
        code = _run("nvdisasm", "-c", str(binary))
    instructions = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.M))
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spilled": max(int(v) for v in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "shared": kernel.metadata.shared,
        "loads": _widths(instructions, ("LDG", "LDGSTS")),
        "stores": _widths(instructions, ("STG",)),
        "atomics": sum(c for o, c in instructions.items() if re.match(r"(RED|ATOMG?)(\.|$)", o)),
        "matrix": sum(c for o, c in instructions.items() if re.match(r"(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTC\w*MMA)", o)),
    }


def _widths(instructions: Counter[str], names: tuple[str, ...]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for instruction, count in instructions.items():
        if instruction.split(".")[0] in names:
            width = re.search(r"\.(128|64|U16|S16|U8|S8)(?:\.|$)", instruction)
            found[int(width.group(1).lstrip("US")) if width else 32] += count
    return dict(sorted(found.items(), reverse=True))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout
