"""`preloaded`, and what Megatron's own pretrain() imports and reads out of its sources before it starts, in each child anew."""

import argparse
from functools import cache

import preloaded  # noqa: F401
from megatron.core.datasets import gpt_dataset
from megatron.training import argument_utils, arguments

import pipehc.megatron.job.enable  # noqa: F401


def remember_help() -> None:
    """Megatron parses the sources of its configurations for the help of their options, twice a job."""
    factory = argument_utils.ArgumentGroupFactory
    read, without = factory._get_field_docstrings, object.__new__(factory)
    remembered = cache(lambda source: read(without, source))
    factory._get_field_docstrings = lambda self, source: remembered(source)
    arguments.add_megatron_arguments(argparse.ArgumentParser())


remember_help()
gpt_dataset.MockGPTLowLevelDataset.size = 1000  # documents, not 100,000, whose samples are shuffled three times a job
