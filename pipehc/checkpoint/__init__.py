"""Checkpoints: committed by one rename, verified before they are loaded, readable by every layout.

Begin with `store.py`. Knows tensors, files and ranks; nothing of models, optimizers or configurations.
"""
