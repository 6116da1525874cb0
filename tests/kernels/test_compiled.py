"""What Triton compiles anew for, asked of Triton itself: a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def without_interpreter(code):
    """What `code` prints as JSON."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PIPEHC_KERNELS": "triton", "PYTHONPATH": str(ROOT / "tools")}
    return json.loads(subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE).stdout)


LAUNCHES = """
import json, collections, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from pipehc.kernels import coefficients_pre, language, post_res, post_res_pre, pre
from pipehc.kernels.manifolds import Birkhoff

backend, found = make_backend(GPUTarget("cuda", 90, 32)), collections.defaultdict(set)
def run(kernel, *arguments, grid, warmup, **named):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(*arguments, **named)
    found[kernel.fn.__name__].add(repr([specialization, options]))
JITFunction.run = run
language.INTERPRETED = True  # the tensors are on the CPU

n, c = 4, 24
def leaf(*shape):
    return torch.zeros(*shape, requires_grad=True)
parameters = leaf(n * c, n * n + 2 * n), leaf(3), leaf(n * n + 2 * n)
for tokens in (1, 2, 15, 16, 17, 1000, 1024, 1025, 5000):
    x = leaf(tokens, n, c)
    y, h_post, h_res = coefficients_pre(x, *parameters, manifold=Birkhoff())
    x_next, y_next, h_post, h_res = post_res_pre(x, y, h_post, h_res, *parameters, manifold=Birkhoff())
    post_res(x_next, y_next, h_post, h_res).sum().backward()
    post_res(x, leaf(tokens, c), leaf(tokens, n), leaf(tokens, n, n)).sum().backward()
    pre(x, leaf(tokens, n)).sum().backward()
print(json.dumps({name: len(keys) for name, keys in found.items()}))
"""


def test_no_number_of_tokens_compiles_anew():
    found = without_interpreter(LAUNCHES)
    # With and without a post_res before, with and without one deferred.
    kinds = {"project_kernel": 2, "map_backward_kernel": 2, "stream_gradient_kernel": 3}
    assert set(found) == {
        "project_kernel",
        "map_kernel",
        "map_backward_kernel",
        "stream_gradient_kernel",
        "phi_gradient_kernel",
        "parameter_sum_kernel",
        "pre_kernel",
        "pre_backward_kernel",
        "post_res_kernel",
        "post_res_backward_kernel",
    }
    assert all(count <= kinds.get(name, 1) for name, count in found.items()), found


def test_specialization_is_what_tells_binaries_apart():
    code = """
import json
from compiled import forms, specialization
from pipehc.kernels.manifolds import Birkhoff
form = forms(Birkhoff())["project_kernel of post_res_pre all streams"]
print(json.dumps([[specialization(form, {name: v}, 90) for v in (1280, 7168, 1001, 1)] for name in ("C", "T")]))
"""
    (wide, same, odd, one), tokens = without_interpreter(code)
    assert wide == same and len({str(v) for v in (wide, odd, one)}) == 3
    assert all(v == tokens[0] for v in tokens)


def test_channels_that_nothing_divides_compile():
    code = """
import json
from compiled import forms, resources
from pipehc.kernels.manifolds import Birkhoff
every = forms(Birkhoff())
names = ["pre_kernel", "post_res_kernel", "project_kernel of post_res_pre all streams", "map_kernel with norm Birkhoff"]
names += ["map_backward_kernel Birkhoff", "phi_gradient_kernel all streams", "stream_gradient_kernel of post_res_pre all streams"]
print(json.dumps([resources(every[name], 1001, 90)["atomics"] for name in names]))
"""
    found = without_interpreter(code)
    assert found == [0] * 7


@pytest.mark.slow
@pytest.mark.parametrize(("n", "streams"), [(3, "fp16"), (8, "fp32")])
def test_every_number_of_streams_compiles_and_fits(n, streams):
    """The least shared memory of the three architectures is that of sm_80: 163 KB of a thread block."""
    code = f"""
import json
from compiled import forms, resources
from pipehc.kernels.manifolds import Birkhoff
found = {{name: resources(form, 2560, 80, "{streams}") for name, form in forms(Birkhoff(), {n}, 80).items()}}
print(json.dumps({{name: [r["shared"], r["atomics"]] for name, r in found.items()}}))
"""
    found = without_interpreter(code)
    assert len(found) == 21
    assert all(shared <= 163 * 1024 and atomics == 0 for shared, atomics in found.values()), found


@pytest.mark.slow
def test_products_whose_factors_take_registers_do_not_spill():
    code = """
import json
from compiled import forms, resources
every = forms(arch=80)
names = [name for name in every if name.startswith(("project_kernel", "stream_gradient_kernel"))]
print(json.dumps([[name, resources(every[name], 2560, 80)["spilled"]] for name in names]))
"""
    found = without_interpreter(code)
    assert len(found) == 12 and not any(spilled for _, spilled in found), found
