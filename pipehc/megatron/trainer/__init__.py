"""The trainer's model out of Megatron's layers: stages, process groups, DDP and the distributed optimizer, indexed data.

May import what stands in `pipehc.megatron`, never `job`. Begin with `model.py`.
"""
