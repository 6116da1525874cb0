"""At depth, raw HC's composite gain grows; the constrained maps hold their invariants, and feedback holds Harmonized HC's gain."""

import pytest
import torch

from pipehc.model.gain import GainFeedback
from pipehc.model.hyper_connection import HyperConnection, composite, composite_gain

DEPTH, STREAMS, CHANNELS, TOKENS = 60, 4, 16, 64


def connections(kind, strength=1.0):
    """Sub-layers with strong maps, as training may make them."""
    generator = torch.Generator().manual_seed(0)
    made = [HyperConnection(CHANNELS, STREAMS, kind, alpha=0.3) for _ in range(DEPTH)]
    for connection in made:
        connection.reset_parameters(generator)
        with torch.no_grad():
            connection.phi.normal_(0, strength, generator=generator)
            connection.bias += 0.3 * torch.randn(connection.bias.shape, generator=generator)
    return made


@torch.no_grad()
def products(made):
    """The composite of all maps H_res for each token, [tokens, n, n] in fp64, and the composite of their token means."""
    generator = torch.Generator().manual_seed(1)
    product, means = torch.eye(STREAMS, dtype=torch.float64).expand(TOKENS, -1, -1), []
    for connection in made:
        _, _, h_res = connection.coefficients(torch.randn(TOKENS, 1, STREAMS * CHANNELS, generator=generator))
        product = h_res.double() @ product
        means.append(h_res.mean(0))
    return product, composite(means, STREAMS)


def amax(product):
    """Largest absolute row sum and column sum, averaged over the tokens."""
    return max(float(product.abs().sum(axis).amax(-1).mean()) for axis in (-1, -2))


def test_raw_hyper_connections_explode_with_depth():
    made = connections("hc")
    assert amax(products(made[:10])[0]) < amax(products(made[:30])[0]) / 10 < amax(products(made)[0]) / 100


def test_doubly_stochastic_maps_stay_bounded():
    product, _ = products(connections("mhc"))
    assert amax(product) <= 1.7 and float(product.min()) >= 0
    assert torch.allclose(product.sum(-1), torch.ones(TOKENS, STREAMS, dtype=torch.float64), atol=1e-4)


def test_isometries_keep_mean_and_energy():
    # Of 3840 wild random maps some are worse conditioned than the 1e4 up to which isometry is promised.
    product, _ = products(connections("isohc", strength=0.05))
    eye, ones = torch.eye(STREAMS, dtype=torch.float64), torch.ones(STREAMS, 1, dtype=torch.float64)
    assert float((product.mT @ product - eye).abs().max()) < 1e-4
    assert float((product @ ones - ones).abs().max()) < 1e-4


@pytest.mark.slow
def test_feedback_holds_the_applied_gain_at_its_target():
    made, feedback = connections("harmonized"), GainFeedback(target=5.0, power=1.0, smallest=0.05)
    wild = composite_gain(products(made)[1])
    gains = []
    for _ in range(150):
        gains.append(composite_gain(products(made)[1]))
        s = feedback.update(gains[-1])
        for connection in made:
            connection.get_buffer("s").fill_(s)
    assert wild > 50
    assert 0.05 <= feedback.s < 1
    assert max(gains[-20:]) < wild / 5


def test_feedback_state_survives():
    feedback = GainFeedback(5.0, 1.0, 0.05)
    feedback.update(80.0)
    again = GainFeedback(5.0, 1.0, 0.05)
    again.load(feedback.state())
    assert again.update(7.0) == feedback.update(7.0)
    assert feedback.average == pytest.approx(0.95 * 80 + 0.05 * 7)
