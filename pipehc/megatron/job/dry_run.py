"""`python -m pipehc.megatron.job.dry_run [--nnodes N] [--nproc-per-node N] SCRIPT ARGUMENTS...` in the place of torchrun.

Memory and step of a job of megatron.training under the schedule that its script gives to `enable`, without a GPU and without data:
the job's own script, for each pipeline rank that differs. No checkpoint is read, no data set built, nothing written; the script
must not need to know. What it prints is what `python -m pipehc.plan --dry-run` prints of a configuration.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipehc.comm.environment import quiet_libraries
from pipehc.config.strict_yaml import ConfigError
from pipehc.planning.dry_run import command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipehc.megatron.job.dry_run",
        description="Memory and time of a step of a Megatron pretraining script under our schedules, before any GPU is asked for.",
    )
    parser.add_argument("--nnodes", default="1", metavar="N", help="as of torchrun (default: %(default)s)")
    parser.add_argument("--nproc-per-node", default="1", metavar="N", help="as of torchrun (default: %(default)s)")
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("script", metavar="SCRIPT", help="the training script, which calls pipehc.megatron.enable()")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    asked = command.asked(args)
    world_size = _positive(args.nnodes, "--nnodes") * _positive(args.nproc_per_node, "--nproc-per-node")
    if not Path(args.script).is_file():
        raise ConfigError(f"SCRIPT {args.script}: there is no such file")
    quiet_libraries()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: whether there is a GPU must not matter
    # Torch and Megatron take seconds to import: a wrong question should not have to wait for them.
    from pipehc.megatron import cpu

    with cpu.uncompiled():
        from pipehc.megatron.job.dry_job import ScriptError, costs, dry_runs

    try:
        if args.costs is not None:
            command.write_costs(costs(args.script, args.arguments, world_size, asked), args.costs)
            return 0
        found = dry_runs(args.script, args.arguments, world_size, asked)
    except ScriptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command.show(found[0], found[1] if len(found) > 1 else None, args)
    return 0


def _positive(text: str, flag: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(f"{flag} {text}: must be a whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
