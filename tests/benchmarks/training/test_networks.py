"""The experiments' networks are the paper's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.training.networks import (
    WIDTHS,
    fully_connected,
    network,
    resnet14,
    small_gpt,
    small_vgg,
)


def test_the_network_is_the_papers() -> None:
    """Catches another width or depth, and an initialisation that draws from the global generator."""
    state = torch.get_rng_state()
    model = fully_connected(WIDTHS["fashion-mnist"], seed=0)
    assert sum(p.numel() for p in model.parameters()) == 898_510
    assert torch.equal(torch.get_rng_state(), state)


def test_the_small_vgg_is_the_papers() -> None:
    """Catches another number of channels, and a convolution that is drawn otherwise."""
    model = small_vgg(seed=0)
    assert sum(p.numel() for p in model.parameters()) == 71_410
    for layer in (m for m in model if isinstance(m, nn.Conv2d)):
        weights = layer.weight.numel()
        # The standard deviation of a sample of m normal numbers is right to about 1 / sqrt(2 m).
        expected = (2 / (9 * layer.out_channels)) ** 0.5
        assert float(layer.weight.detach().std()) == pytest.approx(
            expected, rel=4 / (2 * weights) ** 0.5
        )
        assert not layer.bias.any()


def test_resnet14() -> None:
    """Catches a stage that does not halve its image or double its channels."""
    model = resnet14(seed=0).eval()
    shapes = []
    x = torch.zeros(2, 3, 32, 32)
    for layer in model:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes[3:9] == 2 * [(16, 32, 32)] + 2 * [(32, 16, 16)] + 2 * [(64, 8, 8)]
    assert x.shape == (2, 10)


def test_the_gpt_sees_no_later_token() -> None:
    """Catches a mask that is turned around or missing."""
    model = small_gpt(seed=0, vocabulary=5, context=6, width=16, layers=2)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0]])
    changed = tokens.clone()
    changed[0, 3] = 1
    apart = (model(tokens) - model(changed)).abs().amax(1)[0]
    assert not apart[:3].any()
    assert (apart[3:] > 0).all()


@pytest.mark.parametrize("data", ["digits", "cifar10-2"])
def test_a_scale_bounds_weights_and_biases(data: str) -> None:
    """Catches a scale that goes by the outputs, leaves biases out, or is not uniform up to its end."""
    model = network(data, seed=0, scale=3.0)
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)):
        bound = 3 / layer.weight[0].numel() ** 0.5
        largest = float(layer.weight.detach().abs().max())
        # Of m numbers uniform up to 1, the largest is below 0.9 with probability 0.9^m < 1e-26.
        assert 0.9 * bound < largest <= bound
        assert float(layer.bias.detach().abs().max()) <= bound
    other = network(data, seed=1, scale=3.0)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))


def test_networks_by_name() -> None:
    """Catches a name that gives another network, and one that is not known."""
    assert isinstance(network("cifar10", seed=0, kind="resnet")[1], nn.BatchNorm2d)
    assert network("cifar10", seed=0)[-1].out_features == 10
    assert network("cifar10-2", seed=0)[-1].out_features == 2
    with pytest.raises(ValueError, match="network='lstm'"):
        network("digits", seed=0, kind="lstm")
