"""Megatron-core 0.19.2 on a machine without CUDA: the patches that our code path needs, each with the place that needs it.

Importing this module does nothing. `groups.build_groups` calls `install` when there is no CUDA; on a GPU machine none of it runs.
The tests fail without any one of the patches.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MARK = "_pipehc_cpu"


def install() -> None:
    """Patch torch.cuda and two Megatron functions for CPU tensors; a second call changes nothing.

    Raises:
        RuntimeError: if CUDA is available, where every one of these patches would be wrong.
    """
    if torch.cuda.is_available():
        raise RuntimeError("pipehc.megatron.cpu.install() is for machines without CUDA; this one has it")
    if hasattr(torch.cuda.current_device, _MARK):
        return
    _patch_device()
    _patch_factories()
    _patch_streams()
    _patch_type_names()
    _patch_splits()
    # Megatron compiles small functions (the router's token count); that costs seconds a process here and wants a C++ compiler.
    torch.compiler.set_stance("force_eager")


@contextmanager
def uncompiled() -> Iterator[None]:
    """Megatron imported inside, on a machine without CUDA, keeps its small functions as they are written. `torch.compile`, called
    for each of them, loads a compiler for seconds of processor time, which `install` then switches off."""
    if torch.cuda.is_available():
        yield
        return
    compile = torch.compile
    torch.compile = lambda model=None, **_: (lambda function: function) if model is None else model  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile


def _patch_device() -> None:
    """Parameters, router buffers and RoPE frequencies are made on, or moved to, `torch.cuda.current_device()`."""

    def current_device() -> torch.device:
        return torch.device("cpu")

    setattr(current_device, _MARK, True)
    torch.cuda.current_device = current_device  # type: ignore[assignment]


def _patch_factories() -> None:
    """The optimizer's scalars (loss scale, gradient norm, overflow flag) are made with `device="cuda"`."""

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return make

    torch.tensor = on_cpu(torch.tensor)
    torch.zeros = on_cpu(torch.zeros)


class _Event:
    def synchronize(self) -> None:
        """Work on a CPU is done when the call returns."""


class _Stream:
    """One stream, always idle: what is issued on a CPU has run."""

    def record_event(self) -> _Event:
        return _Event()


def _patch_streams() -> None:
    """The all-to-all dispatcher copies token counts to the host on a stream of its own and waits for its event."""
    stream = _Stream()
    torch.cuda.Stream = lambda *args, **kwargs: stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment,return-value]


def _patch_type_names() -> None:
    """The distributed optimizer and gradient clipping tell dtypes apart by the name 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = tensor_type  # type: ignore[assignment]


def _patch_splits() -> None:
    """all_to_all_single takes its split sizes as numbers, but upstream converts them to numpy only if they are on CUDA."""
    from megatron.core.transformer.moe import token_dispatcher

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
