"""Recomputation of what hyper-connections can rebuild cheaply: the block planner and the engine.

Imports comm. Begin with `chain.py` (a stage as pieces), then `engine.py` (one micro-batch on its way through them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipehc.recompute.plan import Memory, cut, memory, optimal_block_size

if TYPE_CHECKING:
    from pipehc.recompute.chain import Chain, Exchange, Piece
    from pipehc.recompute.engine import Pass
    from pipehc.recompute.saved import SavedBytes

__all__ = ["Chain", "Exchange", "Memory", "Pass", "Piece", "SavedBytes", "cut", "memory", "optimal_block_size"]

_ENGINE = {"Chain": "chain", "Exchange": "chain", "Pass": "engine", "Piece": "chain", "SavedBytes": "saved"}


def __getattr__(name: str) -> Any:
    """The engine needs torch; who only plans does not wait for it."""
    if name not in _ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_ENGINE[name]}"), name)
