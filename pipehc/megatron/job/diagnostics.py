"""Diagnostics of the streams in a job's steps, as our own trainer makes them: FOLDER/diagnostics.jsonl, TensorBoard, warnings."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import nn

from pipehc.megatron.job.hybrid import layer_pattern
from pipehc.megatron.job.models import HybridStack
from pipehc.megatron.layer import hyper_connection_layers
from pipehc.model.streams import Part, StreamFigures, is_due
from pipehc.watch.metrics import DIAGNOSTICS, MetricsFile
from pipehc.watch.stream_warnings import StreamWarnings, summary


@dataclass
class Diagnosed:
    """A step that is looked at. s: of harmonized maps in it. scale: by which a micro-batch's loss was multiplied."""

    step: int
    figures: StreamFigures
    shape: dict[str, Any]
    s: float | None
    scale: float


class Diagnostics:
    """interval: iterations of the job from one look to the next, the first one besides; 0: never. folder: for the files."""

    def __init__(self, interval: int, folder: Path, gain_bound: float) -> None:
        self.interval, self.folder = interval, folder
        self._warnings = StreamWarnings(gain_bound)
        self._file: MetricsFile | None = None
        self._board: Any = None

    def begin(
        self,
        step: int,
        chunks: Sequence[nn.Module],
        held: Sequence[tuple[int, int]],
        config: Any,
        tokens: int,
        microbatches: int,
        groups: Any,
    ) -> Diagnosed | None:
        """Of a training step that begins. tokens: of a whole sequence."""
        if not is_due(step, self.interval):
            return None
        layers = hyper_connection_layers(chunks)
        residual = layers[0].residual if layers else None
        n = layers[0].streams if layers else 1
        models: list[Any] = [unwrap_model(chunk) for chunk in chunks]
        decoders = [model.decoder for model in models]
        hybrid = isinstance(decoders[0], HybridStack)
        each = 1 if hybrid else 2  # sub-layers of a layer
        shape = {"kind": residual.kind if residual else "none", "streams": n, "sublayers": each * config.num_layers}
        shape |= {"layers": "".join(layer_pattern(models[0].hybrid_layer_pattern))} if hybrid else {}
        of_chunks = {
            key: range(each * (decoder.layers[0].layer_number - 1), each * decoder.layers[-1].layer_number)
            for key, decoder in zip(held, decoders)
        }
        part = own_part(groups, config.sequence_parallel)
        s = None
        if residual is not None and residual.kind == "harmonized":
            one = next(iter(layers[0].connections().values()))
            s = float(one.get_buffer("s"))
        scale = 1.0 if config.grad_scale_func is None else float(config.grad_scale_func(torch.ones(1, device=_device(chunks))))
        if not config.calculate_per_token_loss:
            scale *= groups.cp.size() / microbatches  # of a token's loss, beside that it is one of a micro-batch
        return Diagnosed(step, StreamFigures(of_chunks, shape["sublayers"], n, tokens, part), shape, s, scale)

    def prepare(self) -> None:
        """Before the first step. ValueError where rank 0 cannot write."""
        if self.interval and dist.get_rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
            except OSError as error:
                raise ValueError(f"diagnostics_folder = {str(self.folder)!r}: cannot be written: {error.strerror}") from error

    def end(self, seen: Diagnosed, chunks: Sequence[nn.Module]) -> None:
        """After the step: writes what `seen.figures` has brought together since its `start`."""
        found = seen.figures.finish(seen.scale)
        if found is None:
            return
        if seen.s is not None:
            one = next(iter(hyper_connection_layers(chunks)[0].connections().values()))
            found |= {"s": seen.s, "gain_average": float(one.get_buffer("gain_average"))}
        told = self._warnings.look(found)
        if self._file is None:
            self._open(seen.step)
        assert self._file is not None
        self._file.write(seen.step, seen.shape | found | ({"warnings": told} if told else {}))
        if self._board is not None:
            for name, value in summary(found).items():
                self._board.add_scalar(f"streams/{name}", value, seen.step)
            self._board.flush()
        for text in told:
            warnings.warn(f"pipehc: iteration {seen.step}: {text}", stacklevel=2)

    def _open(self, step: int) -> None:
        """Lines of this step and later ones, of a course that was given up, go; a job that starts anew keeps the file aside."""
        self._file = MetricsFile(self.folder / DIAGNOSTICS, step - 1)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # it is optional
            return
        self._board = SummaryWriter(str(self.folder), purge_step=step)


def own_part(groups: Any, sequence_parallel: bool) -> Part:
    """Which tokens of the first sequence of the global batch this rank has."""
    if parallel_state.get_data_parallel_rank() != 0:
        return Part(count=0)
    cp, tp = groups.cp, groups.tp
    if sequence_parallel:
        return Part(cp.rank() * tp.size() + tp.rank(), cp.size() * tp.size())
    return Part(cp.rank(), cp.size() if tp.rank() == 0 else 0)


def _device(chunks: Sequence[nn.Module]) -> torch.device:
    return next(chunks[0].parameters()).device
