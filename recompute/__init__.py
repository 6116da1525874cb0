"""Recomputation of what hyper-connections can rebuild cheaply: the block planner and the engine."""

from pipehc.recompute.chain import Chain, Exchange, Piece
from pipehc.recompute.engine import Pass
from pipehc.recompute.plan import Memory, cut, memory, optimal_block_size
from pipehc.recompute.saved import SavedBytes

__all__ = ["Chain", "Exchange", "Memory", "Pass", "Piece", "SavedBytes", "cut", "memory", "optimal_block_size"]
