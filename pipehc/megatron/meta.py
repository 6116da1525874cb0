"""Megatron-core and torch.distributed for a dry run: one rank of a job, on tensors without data and without peers.

Beside the patches of `cpu`, those that the `meta` device needs, each with the place that needs it. Importing this module does
nothing. With device cpu the same program runs on real tensors, for a comparison: only what stands for the peers is patched.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_iter

from pipehc.megatron import cpu


def install(rank: int, world_size: int, device: torch.device, imbalance: float = 1.0) -> None:
    """Makes this process rank `rank` of `world_size` for good: a process of its own should run it.

    device: meta, or cpu for real tensors. imbalance: rows that the experts of this rank get, as a multiple of the mean over ranks.
    Raises RuntimeError if CUDA is available: hide it with CUDA_VISIBLE_DEVICES before torch is imported.
    """
    cpu.install()
    _join_fake_group(rank, world_size)
    _patch_object_collectives()
    _patch_routing(imbalance)
    if device.type == "meta":
        _patch_coalesced_collectives()
        _patch_device(device)
        _patch_type_names()
        _patch_attention()


def _join_fake_group(rank: int, world_size: int) -> None:
    """Torch's process group without peers: every collective returns at once and has moved nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    new_group = dist.new_group

    @functools.wraps(new_group)
    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs | {"backend": "fake", "pg_options": None})

    dist.new_group = fake_group


def _patch_object_collectives() -> None:
    """Objects travel as tensors of bytes, which nobody would fill: every peer is taken to say what this rank says."""

    def all_gather_object(everyone: list[Any], own: Any, group: Any = None) -> None:
        everyone[:] = [own] * len(everyone)

    dist.all_gather_object = all_gather_object  # type: ignore[assignment]
    dist.broadcast_object_list = lambda *args, **kwargs: None


def _patch_routing(imbalance: float) -> None:
    """How many tokens go to which expert is read from the device. Upstream's own count runs, and is replaced by an even one."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from pipehc.megatron import counts

    def even(self: Any) -> dict[str, np.ndarray]:
        """What upstream counts, by its names."""
        each, rest = divmod(self.routing_map.size(0) * self.config.moe_router_topk, self.num_experts)
        sent = np.full(self.num_experts, each, dtype=np.int64)
        sent[:rest] += 1
        here = sent[self.local_expert_indices]
        if self.ep_size > 1:
            here = np.round(here * imbalance).astype(np.int64)
        received = np.tile(here, (self.tp_size * self.ep_size, 1))  # from every rank as many as from this one
        return {
            "tokens_per_expert": received.sum(0),
            "input_splits": sent.reshape(self.ep_size, self.num_local_experts).sum(1),
            "output_splits": received[: self.ep_size].sum(1),
            "output_splits_tp": np.full(self.tp_size, received[: self.ep_size].sum()),
            "num_global_tokens_per_local_expert": received,
        }

    original = MoEAlltoAllTokenDispatcher.preprocess
    copied = MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize

    @functools.wraps(original)
    def preprocess(self: Any, routing_map: torch.Tensor) -> Any:
        counted = original(self, routing_map)
        if self.ep_size > 1:
            return counted  # read later
        numbers = even(self)
        self.output_splits_tp = numbers["output_splits_tp"]
        self.num_global_tokens_per_local_expert = torch.from_numpy(numbers["num_global_tokens_per_local_expert"])
        return torch.from_numpy(numbers["tokens_per_expert"])

    def fetched(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        """Where upstream's own layer, as in a depth module, copies them to the host."""
        if self.ep_size == 1:
            return copied(self, point, tokens_per_expert)
        if point != self.cuda_dtoh_point:
            return tokens_per_expert
        self.tokens_per_expert = tokens_per_expert
        for name, found in even(self).items():
            if name != "num_global_tokens_per_local_expert" or self.num_local_experts > 1:
                fetching(getattr(self, name))
                setattr(self, name, found if "splits" in name else torch.from_numpy(found))
        return self.tokens_per_expert

    def fetching(tensor: torch.Tensor) -> Any:
        torch.empty_like(tensor).copy_(tensor)

    def numbers(self: Any) -> list[int]:
        found = even(self._dispatcher)
        return [int(number) for name in self._shapes for number in found[name].ravel()]

    MoEAlltoAllTokenDispatcher.preprocess = preprocess
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = fetched
    counts.fetching, counts.Counts._numbers = fetching, numbers  # type: ignore[method-assign]


_library: Any = None  # its registrations end with it


def _patch_coalesced_collectives() -> None:
    """The reductions of several buckets at once, which torch has no meta kernels for."""
    global _library
    try:
        fake = import_module("torch.distributed._meta_registrations")
    except ModuleNotFoundError:  # torch 2.9, where the other collectives are registered here as well
        fake = import_module("torch.distributed._tools.fake_collectives")
    _library = torch.library.Library("c10d", "IMPL")
    for name in ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_", "allreduce_coalesced_"):
        _library.impl(name, lambda *args: fake.create_fakework(args, return_first_arg=False), "Meta")


def _patch_device(device: torch.device) -> None:
    """Parameters, buffers and the optimizer's scalars are made on `torch.cuda.current_device()` or with `device="cuda"`."""

    def current_device() -> torch.device:
        return device

    setattr(current_device, cpu._MARK, True)  # or `build_groups` would install the other patches once more
    torch.cuda.current_device = current_device  # type: ignore[assignment]
    for name in ("zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, _on(device, getattr(torch, name)))
    _patch_tensor(device)


def _on(device: torch.device, factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = device
        return factory(*args, **kwargs)

    return make


def _patch_tensor(device: torch.device) -> None:
    """`torch.tensor` makes tensors that nobody is told of, and has to read its data: the gradient norm is that of the norms of all
    parameters."""
    original = torch.tensor

    @functools.wraps(original)
    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, list) and any(isinstance(v, torch.Tensor) and v.is_meta for v in tree_iter(data)):
            shape = (len(data), len(data[0])) if isinstance(data[0], list) else (len(data),)
            return torch.empty(shape, device=device)
        if str(kwargs.get("device", "cpu")).startswith(("cuda", "meta")):
            like = original(data, *args, **kwargs | {"device": "cpu"})
            return torch.empty(like.shape, dtype=like.dtype, device=device)
        return original(data, *args, **kwargs)

    torch.tensor = tensor


def _patch_type_names() -> None:
    """As for CPU tensors: the optimizer tells dtypes apart by 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        return found.replace("torch.cuda.meta.", "torch.cuda.") if isinstance(found, str) else found

    torch.Tensor.type = tensor_type  # type: ignore[assignment]


def _patch_attention() -> None:
    """torch chooses the attention for the device, and for meta the one that keeps all scores. A GPU, where keys and values differ
    in width, runs the memory-efficient one (flash wants them equal)."""

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scale: float) -> torch.Tensor:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        result: torch.Tensor = efficient(query, key, value, None, torch.is_grad_enabled(), 0.0, is_causal, scale=scale)[0]
        return result

    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
