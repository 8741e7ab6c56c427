"""Derivatives against closed forms and dense Jacobians."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor

from stableopt.curvature.autodiff import (
    DoubleVjp,
    central_difference,
    gradient_along,
    saved_bytes,
    vjp,
)


def outputs_of(x: Tensor) -> Tensor:
    return torch.stack([x.prod(), x.square().sum(), x[0].exp()])


def test_a_jvp_by_reverse_mode_is_the_jacobian_product() -> None:
    """Catches a transposed Jacobian, and a graph that is gone after the first product."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(outputs_of, x)
    forward = DoubleVjp([outputs_of(x)], [x])
    for v in torch.eye(3, dtype=torch.float64):
        [pushed] = forward.jvp([v])
        torch.testing.assert_close(pushed, jacobian @ v)
        [pulled] = vjp([outputs_of(x)], [x], [v])
        torch.testing.assert_close(pulled, jacobian.T @ v)


def test_constants_among_outputs_keep_their_place() -> None:
    """Catches derivatives that move to another output where one has no graph."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    products = DoubleVjp([torch.ones(3), x**2], [x]).jvp([torch.ones(2)])
    assert products[0] is None
    assert torch.equal(products[1], 2 * x.detach())
    unused = torch.ones(1, requires_grad=True)
    assert DoubleVjp([torch.ones(3)], [x, unused]).jvp([torch.ones(2), None]) == (None,)


@pytest.mark.parametrize("step", [1e-3, 1e-4])
def test_central_differences_are_of_second_order(step: float) -> None:
    """Catches a one-sided difference, whose error is of first order: f''' h^2 / 6 is left."""
    difference = central_difference(math.exp, step)
    assert difference - 1.0 == pytest.approx(step**2 / 6, rel=1e-2, abs=1e-11)


def test_counting_saved_bytes_leaves_no_graph_behind() -> None:
    """Catches a graph that holds the hook that holds the graph: it would never be freed."""
    x = torch.ones(3, requires_grad=True)

    class Held:
        """What a node holds: it is there as long as the graph."""

    references: list[weakref.ref[Held]] = []

    def saving() -> Tensor:
        held = Held()
        references.append(weakref.ref(held))
        y = x * x
        assert y.grad_fn is not None
        y.grad_fn.register_hook(lambda *_, held=held: None)
        return torch.autograd.grad((y * y).sum(), x, create_graph=True)[0]

    assert saved_bytes(saving) > 0
    gc.collect()
    assert references[0]() is None


def test_gradients_along_a_direction() -> None:
    """Catches a distance that is scaled by the direction's norm, and parameters that are left out."""
    point = [torch.zeros(2), torch.ones(1)]
    gradient = gradient_along(
        lambda params: params[0].square().sum() / 2, point, [torch.ones(2), torch.ones(1)]
    )
    assert gradient(0.5).tolist() == [0.5, 0.5, 0.0]
