"""y = H_pre x: reference against loops, kernel against the reference in fp64."""

import loops
import pytest
import torch
from kernel_cases import ADVERSARIAL, DEVICE, TOLERANCE, adversarial, backend, compare, make_inputs

from pipehc.kernels import pre


def inputs(tokens, n, channels, dtype):
    x, _, h_post, _, _ = make_inputs(tokens, n, channels, dtype)
    return x, h_post


def test_reference_equals_loops():
    x, h_pre = (v.double() for v in inputs(3, 4, 5, torch.float64))
    for one, weights, y in zip(x, h_pre, pre(x, h_pre)):
        torch.testing.assert_close(y, torch.from_numpy(loops.pre(one.numpy(), weights.numpy())))


def test_gradients_of_the_reference_in_fp64():
    x, h_pre = (v.double().requires_grad_() for v in inputs(3, 2, 4, torch.float64))
    assert torch.autograd.gradcheck(pre, (x, h_pre))


@pytest.mark.parametrize(("tokens", "n", "channels"), [(0, 2, 5), (1, 1, 1), (17, 3, 70), (5, 4, 64), (3, 6, 33), (4, 8, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel(tokens, n, channels, dtype):
    compare(pre, inputs(tokens, n, channels, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_kernel_on_adversarial_inputs(case):
    x, f, h_pre, _, parameters = make_inputs(6, 3, 20, torch.float32)
    x, _, _ = adversarial(case, x, f, parameters)
    compare(pre, (x, h_pre), 1e-5)


def test_result_has_the_dtype_of_x_and_is_rounded_to_nearest():
    x = torch.tensor([[[1.0, 3.0]]], dtype=torch.bfloat16, device=DEVICE)
    h_pre = torch.tensor([[1.0 + 2**-8 + 2**-9]], device=DEVICE)  # between two bf16 numbers, nearer to the upper one
    for name in ("reference", "triton"):
        with backend(name):
            y = pre(x, h_pre)
        assert y.dtype == torch.bfloat16 and y[0, 0] == 1.0 + 2**-7


def test_bad_shapes_are_named():
    x, h_pre = inputs(3, 2, 4, torch.float32)
    with pytest.raises(ValueError, match=r"h_pre has shape \[2, 2\]: must be \[3, 2\]"):
        pre(x, h_pre[1:])
