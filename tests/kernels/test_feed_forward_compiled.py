"""The kernels of feed-forward networks and routing, compiled as they are launched, without a GPU: once for every model."""

import pytest
from test_compiled import without_interpreter

CODE = """
import collections, json, re, subprocess, sys, tempfile, torch, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from compiled import _run
from pipehc.kernels import language, routing, swiglu

target, found = GPUTarget("cuda", ARCH, 32), collections.defaultdict(dict)
backend = make_backend(target)
def run(kernel, *arguments, grid, warmup, **named):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **named)
    key = repr([specialization, options])
    if key in found[kernel.fn.__name__]:
        return
    options, signature, constants, attributes = kernel._pack_args(backend, named, bound, specialization, options)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)
    with tempfile.TemporaryDirectory() as folder:
        (binary := Path(folder) / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        usage, code = _run("cuobjdump", "-res-usage", str(binary)), _run("nvdisasm", "-c", str(binary))
    spilled = max(int(v) for v in re.findall(r"(?:STACK|LOCAL):(\\d+)", usage))
    found[kernel.fn.__name__][key] = [spilled, "ATOM" in code or "RED." in code, int(re.findall(r"REG:(\\d+)", usage)[0])]
JITFunction.run = run
language.INTERPRETED = True  # the tensors are on the CPU

half = torch.bfloat16
for rows in (1, 15, 16, 24577):
    h = torch.zeros(rows, 64, dtype=half)
    for probs in (None, torch.zeros(rows)):
        for again in (False, True):
            swiglu.swiglu(h, probs)
            swiglu.swiglu_backward_(torch.zeros(rows, 32, dtype=half), h, probs, again)
    x = torch.zeros(rows, 32, dtype=half, requires_grad=True)
    probs, chosen = routing.choose(torch.zeros(rows, 72, requires_grad=True), torch.zeros(72), 6)
    places = routing.place(chosen, 6)
    tokens, of_probs = routing.spread(x, probs, torch.zeros(rows, 6, dtype=torch.int32))
    for more in (None, x):
        routing.collect(tokens, torch.zeros(rows, 6, dtype=torch.int32), more)
    routing.launch_choose_backward(torch.zeros(rows, 72), chosen, torch.zeros(rows, 6), 6)
    routing.launch_spread(x.detach(), torch.zeros(rows, 6, dtype=torch.int32), None)
print(json.dumps({name: list(kinds.values()) for name, kinds in found.items()}))
"""
KINDS = {"swiglu_kernel": 2, "swiglu_backward_kernel": 4, "spread_kernel": 2, "collect_kernel": 2}


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)])
def test_they_compile_without_spills_and_atomics_once_for_any_number_of_tokens(arch):
    found = without_interpreter(CODE.replace("ARCH", str(arch)))
    assert len(found) == 7
    for name, kinds in found.items():
        assert len(kinds) == KINDS.get(name, 1), (name, kinds)
        assert all(spilled == 0 and not atomic for spilled, atomic, _ in kinds), (name, kinds)
