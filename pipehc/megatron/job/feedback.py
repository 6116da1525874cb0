"""The feedback of Harmonized HC inside an existing job: after every step, all maps get the s that holds the composite gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from pipehc.megatron.layer import hyper_connection_layers
from pipehc.model.gain import CompositeGain, GainFeedback


@contextmanager
def gain_feedback(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Around one training step of all ranks. Collective, if the model has harmonized maps; else it does nothing.

    s and its average live in buffers of the maps, so that they are in the job's checkpoints.
    """
    layers = hyper_connection_layers(chunks)
    if not layers or layers[0].residual.kind != "harmonized":
        yield
        return
    residual: Any = layers[0].residual
    connections = {sublayer: connection for layer in layers for sublayer, connection in layer.connections().items()}
    gain = CompositeGain(connections, layers[0].model_sublayers, residual.streams)
    with gain.tracking():
        yield
    one = next(iter(connections.values()))
    gain.start(one.bias.device)
    average = float(one.get_buffer("gain_average"))
    feedback = GainFeedback(
        residual.target_gain, residual.gain_power, residual.smallest_s, float(one.get_buffer("s")), average or None
    )
    feedback.update(gain.finish())
    for connection in connections.values():
        connection.get_buffer("s").fill_(feedback.s)
        connection.get_buffer("gain_average").fill_(feedback.average or 0.0)
