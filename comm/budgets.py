"""What communication may take of a device, and how memory and kernels come: every setting in one table, with its reason.

The environment overrides each of them, a key of the configuration the two that have one. Nothing here was measured: the numbers
are guesses, and the place to change them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

MOST_BLOCKS = 64
"""What NCCL can use of a communicator."""


class Budget(NamedTuple):
    """A setting of a process. variable: of the environment. key: of the configuration. synonyms: other names of the variable."""

    variable: str
    default: str
    reason: str
    key: str = ""
    synonyms: tuple[str, ...] = ()

    def said(self, environment: Mapping[str, str]) -> str | None:
        """What the environment says of it, under whichever name."""
        return next((environment[name] for name in (self.variable, *self.synonyms) if name in environment), None)


MESSAGE_BLOCKS = Budget(
    "PIPEHC_MESSAGE_BLOCKS",
    "4",
    "Thread blocks (CTAs) of one stage message. NCCL's kernels wait on the device, each block on a multiprocessor that nobody else "
    "can use meanwhile, and a rank has a receive waiting on every edge: two edges in each direction hold 16. Unbounded they leave "
    "few, or none, to what they wait for.",
    key="runtime.message_blocks",
)
ALL_TO_ALL_BLOCKS = Budget(
    "PIPEHC_ALL_TO_ALL_BLOCKS",
    "16",
    "Thread blocks of an expert all-to-all, which waits on the device for the slowest rank. NCCL's own limit is 32 on Hopper: with "
    "16 an all-to-all, a sum of gradients (32) and all stage messages (16) leave more than half of 132 multiprocessors to "
    "computation.",
    key="runtime.all_to_all_blocks",
)
CONNECTIONS = Budget(
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "32",
    "Streams beyond this many share hardware queues, and then wait for each other. A rank has a dozen or two; 32 is the most.",
)
MODULE_LOADING = Budget(
    "CUDA_MODULE_LOADING",
    "EAGER",
    "A kernel that is loaded when first used may wait until the device is idle: never, while a receive is posted whose message "
    "depends on this very kernel.",
)
ALLOCATOR = Budget(
    "PYTORCH_ALLOC_CONF",
    "expandable_segments:True",
    "Products of experts change shape with every micro-batch. Segments of fixed size fragment, and to give some back waits for an "
    "idle device, as above; segments that grow need not be given back.",
    synonyms=("PYTORCH_CUDA_ALLOC_CONF",),
)
BEFORE_CUDA = (CONNECTIONS, MODULE_LOADING, ALLOCATOR)
BUDGETS = (MESSAGE_BLOCKS, ALL_TO_ALL_BLOCKS, *BEFORE_CUDA)


def set_gpu_defaults(environment: MutableMapping[str, str]) -> None:
    """Sets what is not set of `BEFORE_CUDA`. Call it before CUDA is initialised; `torch.cuda.is_available` does that."""
    for budget in BEFORE_CUDA:
        if budget.said(environment) is None:
            environment[budget.variable] = budget.default


def blocks(budget: Budget, given: int | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Thread blocks of a communicator: `given` by the configuration, else by the environment, else the default.

    Raises ValueError, naming the variable, for what is no number of blocks.
    """
    if given is not None:
        return given
    text = budget.said(environment) or budget.default
    if not text.isdecimal() or not 1 <= int(text) <= MOST_BLOCKS:
        raise ValueError(f"{budget.variable} = {text!r}: must be a whole number, from 1 to {MOST_BLOCKS}")
    return int(text)
