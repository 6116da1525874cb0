"""Triton chooses between compiler and interpreter when it is first imported, by whichever test: choose before any of them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
