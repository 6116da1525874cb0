"""Repairs of Triton's interpreter (3.5 to 3.9), so that bf16 gives there what it gives on a GPU.

As shipped, `tl.dot` multiplies the 16-bit patterns of bf16 operands as if they were integers, and conversion of fp32 to bf16
truncates where the hardware rounds to nearest even. Up to Triton 3.6 no number can bound a loop under NumPy 2.5, which no
longer takes an array of one element for a number. And every call of a device function puts the interpreter's functions in the
place of the language's once more, which takes half of a kernel's time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def bf16_to_fp32(bits: NDArray[Any]) -> NDArray[Any]:
    """Values of bf16 bit patterns (uint16), any shape."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: NDArray[Any]) -> NDArray[Any]:
    """bf16 bit patterns (uint16) of fp32 values, rounded to nearest even."""
    rounded = torch.from_numpy(np.array(values, dtype=np.float32, order="C")).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def repair() -> None:
    """Replace the interpreter's product, its conversions between fp32 and bf16, and that of a tensor to a number in Python, and let
    it replace the language once a launch. Calling it again changes nothing."""
    if getattr(InterpreterBuilder.create_dot, "repaired", False):
        return
    shipped_cast, shipped_convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    shipped_patch, shipped_patch_all, shipped_launch = (
        interpreter._patch_lang_tensor, interpreter._patch_lang, interpreter.GridExecutor.__call__,
    )  # fmt: skip
    patched: set[frozenset[str]] = set()  # in this launch, by the names of the modules that a function sees

    def value(handle: Any) -> NDArray[Any]:
        return bf16_to_fp32(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(value(a), value(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def bf16_conversion(src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(bf16_to_fp32(src.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(fp32_to_bf16(src.data), tl.bfloat16)
        return None

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        converted = bf16_conversion(src, dst_type)
        return shipped_cast(self, src, dst_type) if converted is None else converted

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        converted = bf16_conversion(src, dst_type)
        return shipped_convert(self, src, dst_type, rounding_mode) if converted is None else converted

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        shipped_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def patch_all(function: Any) -> Any:
        seen = frozenset(each.__name__ for each in function.__globals__.values() if each is tl or each is tl.core)
        if seen in patched:
            return None
        patched.add(seen)
        return shipped_patch_all(function)

    def launch(self: Any, *arguments: Any, **named: Any) -> None:
        patched.clear()
        try:
            shipped_launch(self, *arguments, **named)
        finally:
            patched.clear()  # the launch has put the language back

    create_dot.repaired = True  # type: ignore[attr-defined]
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_lang = patch_all
    interpreter.GridExecutor.__call__ = launch
