"""A stage without Megatron: real hyper-connections, small F's, all-to-alls that go nowhere; all kinds of nodes and queues."""

import torch

from pipehc.model.hyper_connection import HyperConnection
from pipehc.model.norm import RMSNorm
from pipehc.model.sublayers import Sublayer, build_chain
from pipehc.model.wgrad import Accumulate, linear
from pipehc.recompute import Exchange, Piece, cut

TOKENS, STREAMS, CHANNELS = 3, 2, 4


class Toy:
    """`blocks` blocks; the first `dense` ones have no experts. connection: options of the hyper-connections. weights: all that gets
    gradients, by name."""

    def __init__(self, blocks, dense=1, seed=0, **connection):
        self._connection = {"alpha": 0.3} | connection
        self._generator = torch.Generator().manual_seed(seed)
        self.weights = {}
        self.sublayers = [s for block in range(blocks) for s in self._block(block, block >= dense)]

    def chain(self, block=None, first=False, last=False):
        """first: makes the streams of `tokens`. last: makes a loss of them and of `labels`; both as `streams` makes them."""
        entry = Piece("embedding", lambda tokens: (tokens * self._scale("embedding"),), ("tokens",), ("x0",)) if first else None
        end = f"x{len(self.sublayers)}"
        loss = Piece("loss", lambda x, y: ((x * self._scale("loss") - y).square().sum(),), (end, "labels"), ("loss",))
        return build_chain(self.sublayers, cut(len(self.sublayers), block), entry, loss if last else None)

    def take_gradients(self):
        found = {name: weight.grad for name, weight in self.weights.items()}
        for weight in self.weights.values():
            weight.grad = None
        return found

    def _block(self, block, experts):
        attention = Piece("f", self._linear(f"{block}.attention"), ("normed",), ("f",), f"{block}.attention")
        if experts:
            mlp = self._experts(block)
        else:
            mlp = (Piece("f", self._linear(f"{block}.mlp"), ("normed",), ("f",), f"{block}.mlp"),)
        return (
            Sublayer(f"{block}.attention", *self._around(f"{block}.attention"), (attention,)),
            Sublayer(f"{block}.mlp", *self._around(f"{block}.mlp"), mlp, f"{block}.mlp_post", "high"),
        )

    def _experts(self, block):
        tokens, probs, expert = (self._linear(f"{block}.{name}") for name in ("tokens", "probs", "expert"))

        def exchange(name, inputs, outputs):
            def run(*values):
                started = [v.clone() for v in values if isinstance(v, torch.Tensor)]
                return lambda: tuple(started)

            def backward(gradients, splits):
                assert splits == "splits"
                started = [g.clone() for g in gradients]
                return lambda: (*started, None)

            node = f"{block}.{name}"
            return Exchange(name, run, inputs, outputs, node, queue="communication", run_backward=backward)

        return (
            Piece("route", lambda x: (*tokens(x), *probs(x), "splits"), ("normed",), ("t", "p", "splits"), f"{block}.attention"),
            exchange("dispatch", ("t", "p", "splits"), ("ta", "pa")),
            Piece("experts", lambda x, t, p: (*expert(t * p), x * p), ("normed", "ta", "pa"), ("routed", "shared"), f"{block}.mlp"),
            exchange("combine", ("routed", "splits"), ("back",)),
            Piece("sum", lambda r, s: (r + s,), ("back", "shared"), ("f",), f"{block}.mlp_post"),
        )

    def _scale(self, name):
        return self.weights.setdefault(name, torch.ones(1).requires_grad_())

    def _linear(self, name):
        weight = self.weights[name] = torch.randn(CHANNELS, CHANNELS, generator=self._generator).requires_grad_()

        def add(gradient):
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

        return lambda x: (torch.tanh(linear(x, weight, Accumulate(add))),)

    def _around(self, name):
        connection = HyperConnection(CHANNELS, STREAMS, **self._connection)
        connection.reset_parameters(self._generator)
        self.weights |= {f"{name}.{key}": p for key, p in connection.named_parameters()}
        weight = self.weights[f"{name}.norm"] = torch.randn(CHANNELS, generator=self._generator).requires_grad_()
        return connection, RMSNorm(lambda: weight, 1e-6)


def streams(seed):
    return torch.randn(TOKENS, 1, STREAMS * CHANNELS, generator=torch.Generator().manual_seed(seed))
