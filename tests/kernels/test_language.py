"""Kernels run on the device of their tensors, whatever device is current."""

import contextlib

import pytest
import torch
from kernel_cases import backend, make_inputs
from triton.runtime import interpreter

from pipehc.kernels import coefficients_pre, language, post_res, pre
from pipehc.kernels.manifolds import Birkhoff


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    current, launched = [], []
    call = interpreter.GridExecutor.__call__

    @contextlib.contextmanager
    def device_of(x):
        current.append(x.device)
        yield
        current.pop()

    def watched(run, *arguments, **named):
        launched.append(bool(current))
        return call(run, *arguments, **named)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched)
    x, f, h_post, h_res, parameters = make_inputs(2, 2, 8, torch.float32)
    x.requires_grad_()
    with backend("triton"):
        pre(x, h_post).sum().backward()
        post_res(x, f, h_post, h_res).sum().backward()
        y, h_post, h_res = coefficients_pre(x, *parameters, manifold=Birkhoff(1))
        post_res(x, y, h_post, h_res).sum().backward()
    assert len(launched) == 12 and all(launched)


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is a GPU")
def test_tensors_where_kernels_cannot_run_are_refused(monkeypatch):
    monkeypatch.setattr(language, "INTERPRETED", False)
    x, _, h_pre, _, _ = make_inputs(2, 2, 8, torch.float32)
    with backend("triton"), pytest.raises(ValueError, match="PIPEHC_KERNELS=triton on CPU tensors"):
        pre(x, h_pre)


def test_a_tensor_on_another_device_is_named():
    x, f, h_post, h_res, (phi, alpha, bias) = make_inputs(2, 2, 8, torch.float32)
    for call, name in [
        (lambda: pre(x, h_post.to("meta")), "h_pre"),
        (lambda: post_res(x, f.to("meta"), h_post, h_res), "f"),
        (lambda: coefficients_pre(x, phi.to("meta"), alpha, bias, manifold=Birkhoff()), "phi"),
        (lambda: coefficients_pre(x, phi, alpha, bias.to("meta"), manifold=Birkhoff()), "bias"),
    ]:
        with pytest.raises(ValueError, match=f"{name} is on meta: must be on cpu, like x"):
            call()
