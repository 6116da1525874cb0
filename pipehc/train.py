"""Trains a model: torchrun --nproc-per-node N -m pipehc.train --config FILE.yaml [key.sub=value ...]

Started again, the same command goes on from the newest complete checkpoint in the run folder.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from pipehc.checkpoint.store import Checkpoints
from pipehc.comm.budgets import set_gpu_defaults
from pipehc.comm.environment import overlap_warnings, quiet_libraries
from pipehc.comm.groups import NCCL_LIMIT_S
from pipehc.comm.host_group import HOST, register
from pipehc.comm.messages import PeerError, first_line
from pipehc.comm.once import say_once
from pipehc.comm.ranks import RankError, Ranks
from pipehc.comm.watchdog import Watchdog, stopped_siblings
from pipehc.config.loading import add_config_arguments, check_data, check_world_size, run_with_config, to_yaml
from pipehc.config.schema import Config
from pipehc.config.strict_yaml import ConfigError
from pipehc.data.batches import Sampler, Splits, open_splits
from pipehc.megatron import cpu
from pipehc.planning import parameters
from pipehc.planning.activations import as_metrics, describe
from pipehc.resume import Start, choose, load, make_room
from pipehc.watch.metrics import Reporter
from pipehc.watch.run_folder import RunFolder
from pipehc.watch.stream_warnings import StreamWarnings

_SHOW_CURSOR = b"\x1b[?25h\n"  # the progress bar hides it, and nobody else shows it again when a signal ends the process


@dataclass
class Progress:
    """Where this process stands, for the message with which it may have to end."""

    doing: str = "while starting"
    watchdog: Watchdog | None = None

    def stop(self, signum: int, _: FrameType | None = None) -> None:
        """Handles SIGTERM and SIGINT: torchrun sends one to every other process when one is gone."""
        if self.watchdog is not None and threading.current_thread() is threading.main_thread():
            return  # its thread calls this too, and at once, even if the main thread is blocked inside a library
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), _SHOW_CURSOR)
        name = signal.Signals(signum).name
        self.report(f"stopped by {name} {self.doing}: another process ended, or the job was")
        os._exit(128 + signum)

    def expire(self, what: str) -> NoReturn:
        """Ends this process, because it has been waiting for too long."""
        self.report(f"ended: {what}")
        os._exit(1)

    def report(self, what: str) -> None:
        """Says, once a job, why this process ends; leaves what it did last in the run folder; lets stopped processes end too."""
        say_once("; ".join([f"pipehc: rank {os.environ['RANK']} {what}", *map(str, stopped_siblings())]), "end")
        if self.watchdog is not None:
            self.watchdog.dump(what)
        for sibling in stopped_siblings():  # after it was said: other ranks may be about to say it
            sibling.process.resume()


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 when trained, 1 when the training broke off, 2 for a configuration that cannot work."""
    parser = argparse.ArgumentParser(prog="python -m pipehc.train", description=__doc__, allow_abbrev=False)
    add_config_arguments(parser)
    return run_with_config(parser.parse_intermixed_args(argv), run)


def run(config: Config) -> int:
    """Trains on the processes that torchrun started, or on this one alone. Raises ConfigError for what cannot work here."""
    check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_data(config)
    quiet_libraries()
    progress = Progress()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, progress.stop)
    set_gpu_defaults(os.environ)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(own_gpu(config, os.environ, torch.cuda.device_count()))
    limit_s = max(NCCL_LIMIT_S if on_gpu else 60.0, config.runtime.timeout_s)
    register()
    backend = HOST if config.runtime.transport == "host" else "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=limit_s))
    try:
        train(config, progress)
    except ConfigError:
        raise
    except Exception as error:
        progress.report(f"ended {progress.doing}: {first_line(error) if _is_end_of_job(error) else traceback.format_exc()}")
        return 1
    dist.destroy_process_group()
    return 0


def own_gpu(config: Config, environment: Mapping[str, str], gpus: int) -> int:
    """The GPU of this process, of so many on this machine. Raises ConfigError, in all its processes, if they would have to share
    them and NCCL carries the messages: it refuses that."""
    here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if config.runtime.transport == "device" and here > gpus:
        raise ConfigError(
            f"runtime.transport: device: {here} processes on a machine with {gpus} GPU{'s' * (gpus > 1)}; must be host where "
            "processes share a GPU; or start as many as there are, or hide them (CUDA_VISIBLE_DEVICES=)"
        )
    return int(environment["LOCAL_RANK"]) % gpus


def train(config: Config, progress: Progress) -> None:
    """The training loop of one process."""
    # Megatron takes seconds to import: a wrong configuration should not have to wait for it.
    with cpu.uncompiled():
        from pipehc.megatron.trainer.capabilities import capabilities, described
        from pipehc.trainer import Trainer, TrainingError
    from pipehc.watch.markers import Markers

    launcher = _launcher()
    ranks, train = Ranks(), config.train
    try:
        run_folder = RunFolder(Path(config.run.folder), ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    folder = run_folder.path
    report = folder / "watchdog" / f"rank{ranks.rank:05}.txt"
    progress.watchdog = watchdog = Watchdog(report, config.runtime.timeout_s, progress.expire, progress.stop)
    splits = _open_data(config, folder, ranks)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, layout=_layout(config))
    progress.doing = "while choosing a checkpoint"
    begin = choose(config, checkpoints, splits.info, ranks)
    progress.doing = "while building the model"
    trainer = Trainer(config)
    watchdog.watch(trainer.mailbox)
    trainer.observers += [watchdog, Markers(list(trainer.models))] if config.trace.nvtx else [watchdog]
    progress.doing = "while loading a checkpoint"
    start = load(begin, checkpoints, trainer)
    make_room(begin, config, checkpoints, ranks)
    sampler = Sampler(len(splits.train), train.seed)

    _warn()
    diagnosed = config.diagnostics.interval > 0
    troubles = StreamWarnings(config.diagnostics.gain_bound)
    reported = folder, train.steps, start, config.run.tensorboard, ranks.is_main, to_yaml(config)
    with Reporter(*reported, diagnostics=diagnosed) as reporter:
        reporter.say(_greeting(config, splits, begin, start, dist.get_world_size(), trainer.schedule_origin))
        for line in reporter.earlier_streams:
            troubles.look(line)
        reporter.say(described(capabilities(config, list(trainer.models.values()))))

        def evaluate(step: int) -> None:
            progress.doing = f"in the evaluation after step {step}"
            with watchdog.limited(progress.doing):
                trainer.check_replicas()
                found = trainer.evaluate(splits.validation, step)
            reporter.evaluation(step, found.loss, found.accuracy)

        if config.evaluation.interval and start == 0:
            evaluate(0)
        warned = False
        for step in range(start + 1, train.steps + 1):
            progress.doing = f"in step {step}"
            if _launcher() != launcher:
                raise TrainingError("torchrun is gone, and with it whoever could stop or restart this training")
            began = time.perf_counter()
            with watchdog.limited(progress.doing), trainer.recorded(step, folder / "trace"):
                result = trainer.step(step, splits.train, sampler)
            if not warned and (warned := may_come_of_empty_tokens(result.grad_norm, config)):
                reporter.warn(
                    f"gradient norm {result.grad_norm:.1e} in step {step}: where all streams of a token are zero, gradients are "
                    f"divided by the root of residual.norm_eps = {config.residual.norm_eps:g}; residual.norm_eps=1e-6 bounds them"
                )
            if result.streams is not None:
                shape = {"kind": config.residual.kind, "streams": config.residual.width, "sublayers": 2 * config.model.blocks}
                reporter.streams(step, shape | {"loss": result.loss} | result.streams, troubles.look(result.streams))
            tokens_per_s = train.global_batch * train.sequence_length / (time.perf_counter() - began)
            more = dict(result.figures)
            if step == start + 1:
                saved = trainer.saved_activations()
                reporter.say("\n".join(describe(*item) for item in sorted(saved.items())))
                more |= as_metrics(saved)
            if step % config.run.log_interval == 0 or step in (start + 1, train.steps):
                reporter.step(step, loss=result.loss, grad_norm=result.grad_norm, lr=result.lr, tokens_per_s=tokens_per_s, **more)
            if evaluated := _is_due(step, config.evaluation.interval, train.steps):
                evaluate(step)  # checks the replicas, too
            if _is_due(step, config.checkpoint.interval, train.steps):
                if not evaluated:
                    trainer.check_replicas()  # what has drifted apart must not replace a good checkpoint
                progress.doing = f"while saving the checkpoint of step {step}"
                extra = {
                    "data": splits.info.fingerprint,
                    "vocabulary": splits.info.vocabulary,
                    "starts": begin.state(),
                    "samples": trainer.samples_seen,
                    "feedback": trainer.feedback.state(),
                    "config": to_yaml(config),
                }
                checkpoints.save(step, trainer.state(), extra, {"rng": torch.get_rng_state()})
        reporter.finish()


def _launcher() -> int | None:
    """The process number of the torchrun that started this process, if one did. Killed, it cannot end its processes."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def may_come_of_empty_tokens(grad_norm: float, config: Config) -> bool:
    """No gradient is that large otherwise, before it is no number at all."""
    return config.residual.kind != "none" and config.residual.norm_eps < 1e-10 and grad_norm > 1e5


def _is_due(step: int, interval: int, steps: int) -> bool:
    """Every `interval` steps (0: never) and after the last step."""
    return interval > 0 and (step % interval == 0 or step == steps)


def _warn() -> None:
    """Says, once a machine, what in its environment will make the training slower than it could be."""
    here, cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.cpu_count() or 1
    if found := overlap_warnings(os.environ, here, cores, torch.cuda.is_available()):
        say_once("\n".join(f"pipehc: warning: {text}" for text in found), "overlap")


def _greeting(config: Config, splits: Splits, begin: Start, start: int, world: int, origin: str) -> str:
    """What is trained, on what, from where."""
    info, residual = splits.info, config.residual
    shared = f", layers over {config.parallel.tp}" if config.parallel.tp > 1 else ""
    streams = f"{residual.kind} over {residual.streams} streams" if residual.kind != "none" else "plain residual"
    lines = [
        f"{parameters.total(config) / 1e6:,.1f}M parameters ({parameters.active(config) / 1e6:,.1f}M active), {streams}, "
        f"{config.schedule.name} over {config.parallel.pp} of {world} processes{shared}",
        f"retrieval of {config.data.pairs} values by their keys, samples are made as they are drawn"
        if config.data.kind == "retrieval"
        else f"{info.documents:,} documents, {info.train_samples:,} training and {info.validation_samples:,} validation samples "
        f"({info.tokenizer})",
    ]
    if origin:
        lines.append(f"schedule {config.schedule.name}: {origin}")
    if info.joined:
        lines.append("documents are joined without a token between them: the tokenizer names none; data.end_of_document can")
    if start:
        lines.append(f"going on after step {start} of {config.train.steps}, from {begin.path}")
    lines += begin.notes
    if start >= config.train.steps:
        lines.append("nothing left to train: raise train.steps, or start anew with checkpoint.resume=never or another run.folder")
    return "\n".join(lines)


def _open_data(config: Config, folder: Path, ranks: Ranks) -> Splits:
    """Opens the data on every rank. Raises ConfigError on all of them if one cannot, or if they do not see the same data."""
    data, train = config.data, config.train
    try:
        opened: list[Splits] = []

        def open_here() -> str:
            opened.append(
                open_splits(
                    kind=data.kind,
                    paths=data.paths,
                    suffixes=data.suffixes,
                    tokenizer=data.tokenizer,
                    end_of_document=data.end_of_document,
                    validation_fraction=data.validation_fraction,
                    pairs=data.pairs,
                    sequence_length=train.sequence_length,
                    vocab_size=config.model.vocab_size,
                    seed=train.seed,
                    cache=folder / "cache",
                )
            )
            return opened[0].info.fingerprint

        def compare(fingerprints: list[str]) -> None:
            for rank, fingerprint in enumerate(fingerprints):
                if fingerprint != fingerprints[0]:
                    raise ValueError(f"data.paths: {list(data.paths)}: ranks 0 and {rank} see different data; must be the same")

        ranks.exchange(open_here, compare)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return opened[0]


def _layout(config: Config) -> str:
    parallel = config.parallel
    return f"{config.schedule.name} pp={parallel.pp} tp={parallel.tp} ep={parallel.ep}"


def _is_end_of_job(error: Exception) -> bool:
    """Whether the message of `error` says all that a user needs: a peer is gone, the disk is full, the training cannot go on."""
    from pipehc.trainer import TrainingError

    if isinstance(error, PeerError | TrainingError | RankError | dist.DistError | OSError):
        return True
    lost = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "remote worker")
    return any(text in str(error) for text in lost)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a peer is gone, tearing down its connections may block for ever.
    os._exit(code)
