"""What users type for an option of Megatron's: jobs of megatron.training have command line flags, hand-written loops attributes."""

from __future__ import annotations

from argparse import ArgumentParser
from functools import cache
from typing import Any

LAYOUT = (
    "the layout (--num-layers, --pipeline-model-parallel-layout, --hybrid-layer-pattern, --decoder-first- or "
    "--decoder-last-pipeline-num-layers)"
)


def named(option: str, value: Any) -> str:
    """An option and its value under both of its names: `--mtp-num-layers (mtp_num_layers = 1)`."""
    flag = flag_of(option)
    attribute = f"{option} = {value!r}"
    return attribute if flag is None else f"{flag} ({attribute})"


def without(option: str, fine: Any) -> str:
    """How to do without an option, under both of its names. fine: the value of the attribute then."""
    flag = flag_of(option)
    attribute = f"set {option} = {fine!r}"
    return attribute if flag is None else f"leave out {flag} ({attribute})"


def flag_of(option: str) -> str | None:
    """The flag of megatron.training that sets an option, as this version spells it; None if there is none."""
    return _flags().get(option)


@cache
def _flags() -> dict[str, str]:
    try:
        from megatron.training.arguments import add_megatron_arguments
    except ImportError:  # a loop on megatron.core alone
        return {}
    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    flags: dict[str, str] = {}
    for action in parser._actions:
        for spelled in action.option_strings[:1]:
            flags.setdefault(action.dest, spelled)
    return flags
