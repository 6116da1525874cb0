"""Multi-token prediction in one process, against plain PyTorch: losses and gradients of every parameter."""

import pytest
import torch
from plain_model import PlainModel
from processes import run_ranks
from tiny_model import micro_batch, tiny_config

from pipehc.megatron.trainer.groups import build_groups
from pipehc.megatron.trainer.model import buffer_names, build_stage, initialise, parameter_names

DEPTH, WEIGHT = 2, 0.4


def built(*settings):
    """The whole model, and a micro-batch of which some labels are masked: they move with the others."""
    config = tiny_config(f"model.mtp_depth={DEPTH}", f"model.mtp_loss_weight={WEIGHT}", "model.init_std=0.2", *settings)
    stage = build_stage(config, build_groups(1, 1, 1, False), range(config.model.blocks), True, True)
    initialise(stage, 7, config.model.init_std)
    for i, bias in enumerate(buffer_names(stage).values()):
        bias.copy_(torch.tensor([0.3, -0.2, 0.0, -0.1]).roll(i))
    tokens, labels = micro_batch(config, 0)
    labels = labels.clone()
    labels[0, 3:5], labels[1, -1], labels[1, 0] = -1, -1, -1
    return config, stage, tokens, labels


def streams(stage, tokens):
    x = stage.embed(tokens)
    for layer in stage.decoder.layers.values():
        x, _ = layer(x)
    return x


def depth_losses(plain, hidden, tokens, labels, layer):
    """Of each depth the part that is trained. Nothing is rolled in: the sequences end with the last token that has a label.

    hidden [b, s, C]: what the output layer takes. layer: of the depth k, [b, s, C] -> [b, s, C].
    """
    found = []
    for k in range(1, DEPTH + 1):
        name, length = f"mtp.layers.{k - 1}", tokens.shape[1] - k
        embedded = plain.norm(plain.embed(tokens[:, k:]), f"{name}.enorm.weight")
        both = torch.cat([embedded, plain.norm(hidden[:, :length], f"{name}.hnorm.weight")], -1)
        hidden = plain.norm(layer(k, both @ plain.w[f"{name}.eh_proj.weight"].T), f"{name}.final_layernorm.weight")
        share = (labels >= 0).sum() / (labels[:, k:] >= 0).sum()
        found.append(WEIGHT / DEPTH * share * plain.summed(hidden, labels[:, k:]))
    return found


def compare(losses, expected, gradients, wanted, of_maps=1e-5):
    """of_maps: how far the gradients of hyper-connections may be apart; in fp32, where both are, large terms cancel in some."""
    assert losses.dtype == torch.float32 and len(losses) == 1 + DEPTH
    assert losses.tolist() == pytest.approx([float(loss) for loss in expected], rel=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert wanted[name].norm() > 0 or "experts" in name, name
        share = of_maps if "connection" in name else 1e-5
        assert (gradient - wanted[name]).norm() <= share * wanted[name].norm(), name


@pytest.mark.parametrize("fused", ["true", "false"])
def test_losses_and_gradients_equal_plain_pytorch(fused):
    """In fp64, with depth modules of experts and the plain residual."""

    def fn(rank):
        config, stage, tokens, labels = built("residual.kind=none", f"runtime.fused={fused}")
        losses = stage.losses(streams(stage, tokens), labels, tokens)
        losses.sum().backward()
        parameters = parameter_names(stage)
        weights = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
        plain = PlainModel(config, weights | {name: b.double() for name, b in buffer_names(stage).items()})
        hidden = plain.hidden(tokens)

        def layer(k, x):
            return plain.block(x, f"mtp.layers.{k - 1}.mtp_model_layer", dense=False)

        expected = [plain.summed(hidden, labels), *depth_losses(plain, hidden, tokens, labels, layer)]
        sum(expected).backward()
        zero = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        found = {name: zero[name] if p.grad is None else p.grad.double() for name, p in parameters.items()}
        wanted = {name: zero[name] if w.grad is None else w.grad for name, w in weights.items()}
        compare(losses, expected, found, wanted)

    run_ranks(fn, 1)


@pytest.mark.parametrize(("exit", "given"), [("mean", "exit"), ("sum", "exit"), ("mean", "sum")])
def test_streams_end_before_the_depth_modules_and_begin_again_inside(exit, given):
    """Around the layers as they are. A norm follows wherever streams become one, so how they do decides for no loss."""

    def fn(rank):
        config, stage, tokens, labels = built("residual.alpha=0.3", f"residual.exit={exit}", f"model.mtp_input={given}")
        parameters = parameter_names(stage)

        def gradients(losses):
            stage.zero_grad()
            sum(losses).backward()
            return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}

        plain = PlainModel(config, parameters)
        x = streams(stage, tokens).transpose(0, 1).unflatten(-1, (config.residual.streams, -1))
        x = x.mean(-2) if exit == "mean" else x.sum(-2)
        hidden = plain.norm(x, "decoder.final_layernorm.weight")

        def layer(k, x):
            inner = stage.mtp.layers[k - 1].mtp_model_layer
            assert inner.attention_connection.streams == inner.mlp_connection.streams == config.residual.streams
            return inner(x.transpose(0, 1).contiguous())[0].transpose(0, 1)

        expected = [plain.summed(hidden, labels), *depth_losses(plain, hidden, tokens, labels, layer)]
        wanted = gradients(expected)
        losses = stage.losses(streams(stage, tokens), labels, tokens)
        compare(losses, expected, gradients(losses), wanted, of_maps=1e-4)

    run_ranks(fn, 1)
