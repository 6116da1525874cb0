"""Megatron-core's own training jobs on a machine without CUDA: what they need beyond the patches of `cpu.py`.

For trying a job with our schedules on a laptop, and for the tests. Importing this module does nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from pipehc.megatron import cpu

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "empty", "ones", "full", "arange", "rand", "randn", "empty_like", "zeros_like", "as_tensor")


def install(device: torch.device = _CPU) -> None:
    """Patch torch.cuda and Megatron for CPU tensors and gloo; a second call changes nothing.

    device: what stands for "cuda"; meta in a dry run.

    Raises:
        RuntimeError: if CUDA is available, where every one of these patches would be wrong.
    """
    cpu.install()
    if getattr(install, "done", False):
        return
    install.done = True  # type: ignore[attr-defined]
    _patch_device()
    _patch_factories(device)
    _patch_streams()
    _patch_random_state()
    _patch_norm()
    _patch_hybrid_norm()
    _patch_optimizer()


def allow_pretrain() -> None:
    """Let `megatron.training`'s `pretrain` start: it asks for CUDA, and compiles a helper that the package ships compiled."""
    from megatron.training import initialize, training

    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    initialize._compile_dependencies = lambda: None


def _patch_device() -> None:
    """What `pretrain` asks of the one device of a process."""
    nothing = {
        "set_device": None, "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None,
        "is_current_stream_capturing": False, "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
        "max_memory_reserved": 0, "get_device_capability": (0, 0), "device_count": 1, "mem_get_info": (1, 1),
    }  # fmt: skip
    for name, value in nothing.items():
        setattr(torch.cuda, name, lambda *args, _value=value, **kwargs: _value)
    properties = SimpleNamespace(major=0, minor=0, multi_processor_count=1, total_memory=1, name="CPU")
    torch.cuda.get_device_properties = lambda *args, **kwargs: properties  # type: ignore[assignment]
    torch.cuda.memory_stats = lambda *args, **kwargs: {}  # type: ignore[assignment]
    torch.cuda.nvtx.range_push = lambda *args, **kwargs: None  # type: ignore[assignment]
    torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None  # type: ignore[assignment]


def _patch_factories(there: torch.device) -> None:
    """Tensors that are made on, or moved to, "cuda"."""

    def on_cuda(device: Any) -> bool:
        return (isinstance(device, str) and device.startswith("cuda")) or (
            isinstance(device, torch.device) and device.type == "cuda"
        )

    def exchanged(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            if on_cuda(kwargs.get("device")):
                kwargs["device"] = there
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return make

    for name in _FACTORIES:
        setattr(torch, name, exchanged(getattr(torch, name)))
    to = torch.Tensor.to

    @functools.wraps(to)
    def to_there(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and on_cuda(args[0]):
            args = (there, *args[1:])
        if on_cuda(kwargs.get("device")):
            kwargs["device"] = there
        return to(self, *args, **kwargs)

    torch.Tensor.to = to_there  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: to(self, there)  # type: ignore[assignment,method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self.to(there)  # type: ignore[assignment,method-assign]
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class _Stream(_Event):
    """Always idle."""

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()


def _patch_streams() -> None:
    torch.cuda.Stream = _Stream  # type: ignore[misc,assignment]
    torch.cuda.Event = _Event  # type: ignore[misc,assignment]
    stream = _Stream()
    torch.cuda.current_stream = lambda *args, **kwargs: stream  # type: ignore[assignment]
    torch.cuda.default_stream = lambda *args, **kwargs: stream  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment,return-value]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment,method-assign]


def _patch_random_state() -> None:
    """Megatron keeps states of the CUDA generator by name; here they are states of the CPU's."""
    from megatron.core.tensor_parallel import random

    torch.cuda.manual_seed = lambda seed: None  # type: ignore[assignment]
    torch.cuda.manual_seed_all = lambda seed: None  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[assignment]
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def add(self: Any, name: str, seed: int) -> None:
        self._is_initialized = True
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    random.CudaRNGStatesTracker.add = add
    random.CudaRNGStatesTracker.fork = fork


def _patch_norm() -> None:
    """Torch's norm refuses sequence parallelism, for which its weights only have to be marked."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = original(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new


def _patch_hybrid_norm() -> None:
    """HybridStack asks for TransformerEngine's norm by name."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from pipehc.megatron.versions import hybrid_model

    sys.modules[hybrid_model()[1].__module__].TENorm = WrappedTorchNorm  # type: ignore[attr-defined]


def _patch_optimizer() -> None:
    """The distributed optimizer around torch's Adam cannot be loaded: it wants a step count before there was a step, one more among
    the saved states, and gives all parameters one tensor to count in."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load_state_dict = DistributedOptimizer.load_state_dict

    def state_dict_with_steps(self: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return state_dict(self)

    def set_states_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        return set_states(self, model_param, {"step": None, **tensors})

    def load_state_dict_with_steps(self: Any, state: Any) -> Any:
        result = load_state_dict(self, state)
        for one in self.optimizer.state.values():
            if torch.is_tensor(one.get("step")):
                one["step"] = one["step"].clone()
        return result

    DistributedOptimizer.state_dict = state_dict_with_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_step
    DistributedOptimizer.load_state_dict = load_state_dict_with_steps
