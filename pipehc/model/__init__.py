"""Between schedule and model: hyper-connections, sub-layers as chains of pieces, stages, overlapped pairs, split backwards.

Imports kernels, recompute, comm and schedules; never Megatron, so trainer and jobs share all of it. Begin with `stage.py`,
which the executor calls, then `sublayers.py` (how a layer becomes pieces) and `overlap.py` (in which order a pair runs them).
"""
