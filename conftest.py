"""What every test shares, chosen before torch and Triton are first imported, by whichever test."""

import os

# One compute thread, so that forked children (tests/helpers/processes.py) inherit no thread pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
# Triton chooses between compiler and interpreter when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
