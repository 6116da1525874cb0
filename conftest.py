"""What every test shares, chosen before torch and Triton are first imported, by whichever test."""

import gc
import os

import pytest

# One compute thread, so that forked children (tests/helpers/processes.py) inherit no thread pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
# Triton chooses between compiler and interpreter when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish(session):
    """What was imported stays: a collection of garbage need not look at a million objects of torch's and Megatron's each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is taken from the user's cache, and nothing left there."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The configuration of `tests/helpers/one_step.py`, as a file."""
    from one_step import TINY

    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path
