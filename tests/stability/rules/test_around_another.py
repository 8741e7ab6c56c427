"""Lookahead and SAM, which change the limit of the optimizer inside: closed forms, and real classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch_optimizer
from torch import Tensor, nn

from stableopt import StabilityMargins, StabilityMonitor, TargetRegion, UpdateRule, measure, suggest
from stableopt.stability.rules.filters import lookahead_edge, momentum_filter
from stableopt.stability.rules.several import rule_of
from stableopt.steering.lr_laws import LRMeasured, gated_staircase
from stableopt.steering.target import lr_at_limit


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("inner_steps", [1, 2, 5, 6])
def test_lookahead_over_gradient_descent(inner_steps: int, share: float) -> None:
    """Catches another power, and the parity: (1 - k)^n is positive for even n."""
    expected = 1 + ((2 - share) / share) ** (1 / inner_steps) if inner_steps % 2 else 2.0
    assert lookahead_edge(1.0, ((1.0,), (1.0,)), inner_steps, share) == pytest.approx(
        expected, rel=1e-10
    )


@pytest.mark.parametrize("inner_steps", [1, 3, 4])
@pytest.mark.parametrize(("beta", "c"), [(0.5, 1.0), (0.9, 0.9)])
def test_lookahead_of_all_of_the_way_is_the_optimizer_inside(
    inner_steps: int, beta: float, c: float
) -> None:
    """Catches a round that loses the momentum: with alpha = 1 it changes nothing."""
    pair = momentum_filter(beta, 1.0, 0.0, 1.0)
    # The edge touches the circle, where a root is accurate to the tolerance over its slope.
    assert lookahead_edge(c, pair, inner_steps, 1.0) == pytest.approx(
        (1 + beta) * (1 + c), rel=1e-9
    )


def real_lookahead(package: str, inner: torch.optim.Optimizer, inner_steps: int) -> Any:
    if package == "torch_optimizer":
        return torch_optimizer.Lookahead(inner, k=inner_steps, alpha=0.4)
    kinds = pytest.importorskip(package, reason=f"needs {package}")
    return kinds.Lookahead(inner, k=inner_steps, alpha=0.4)


@pytest.mark.parametrize("package", ["torch_optimizer", "pytorch_optimizer"])
@pytest.mark.parametrize(("inner_steps", "momentum"), [(3, 0.0), (4, 0.8)])
def test_the_real_lookahead(package: str, inner_steps: int, momentum: float) -> None:
    """Catches the inner limit for the outer: rounds of the real class shrink at 0.98 of the limit, and
    grow at 1.02.
    """
    curvature = torch.tensor([3.0, 1.0], dtype=torch.float64)
    for factor, grows in ((0.98, False), (1.02, True)):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        inner = torch.optim.SGD([p], lr=1.0, momentum=momentum)
        optimizer = real_lookahead(package, inner, inner_steps)
        unit = UpdateRule.from_optimizer(optimizer)
        assert unit.lookahead == (inner_steps, 0.4)
        inner.param_groups[0]["lr"] = factor * unit.max_sharpness / 3.0
        for _ in range(150 * inner_steps):
            p.grad = curvature * p.detach()
            optimizer.step()
        assert float(p.detach().norm()) > 10 if grows else float(p.detach().norm()) < 0.1


def test_lookahead_over_what_is_not_known_is_not_known() -> None:
    """Catches a limit of an inner optimizer that has none, or whose momentum is changed."""
    kinds = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    p = nn.Parameter(torch.ones(2))
    rprop = kinds.Lookahead(torch.optim.Rprop([p]))
    assert "Rprop" in str(UpdateRule.from_optimizer(rprop).unknown)
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    reset = kinds.Lookahead(sgd, pullback_momentum="reset")
    assert "changes the momentum" in str(UpdateRule.from_optimizer(reset).unknown)
    adam = kinds.Lookahead(torch.optim.Adam([p]))
    assert "has not taken a step" in str(UpdateRule.from_optimizer(adam).unknown)


LR, BETA, ROUND = 0.1, 0.9, (5, 0.5)


def lookahead_over_decays(kinds: Any, decays: tuple[float, float]) -> Any:
    """Return Lookahead after four steps of AdamW, whose groups differ in weight decay."""
    params = [nn.Parameter(torch.tensor([value])) for value in (0.3, -0.2)]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(params, decays, strict=True)]
    inner = torch.optim.AdamW(groups, lr=LR, betas=(BETA, 0.99))
    optimizer = kinds.Lookahead(inner, k=ROUND[0], alpha=ROUND[1])
    for step in range(4):
        for p, gradient in zip(params, (0.5 + 0.1 * step, -0.4 + 0.2 * step), strict=True):
            p.grad = torch.tensor([gradient])
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("decays", [(0.0, 0.01), (1.0, 1.0)])
def test_lookahead_over_decoupled_decay(decays: tuple[float, float]) -> None:
    """The radius of a round of two coupled parameters, with the preconditioner held, is 1 at the limit.
    Catches factors of the decay that move the limit by more than 0.5 %.
    """
    kinds = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    optimizer = lookahead_over_decays(kinds, decays)
    rule = UpdateRule.from_optimizer(optimizer)
    hessian, eye = np.array([[2.0, 0.7], [0.7, 1.0]]), np.eye(2)
    moments = [float(optimizer.optimizer.state[p]["exp_avg_sq"]) for p in params_of(optimizer)]
    entries = (np.sqrt(np.array(moments) / (1 - 0.99**4)) + 1e-8) * (1 - BETA**4)

    def radius(scale: float) -> float:
        rates, gradient = np.diag(LR / entries), (1 - BETA) * scale * hessian
        kept = np.diag(1 - LR * np.array(decays))
        step = np.block([[kept - rates @ gradient, -BETA * rates], [gradient, BETA * eye]])
        power = np.linalg.matrix_power(step, ROUND[0])
        power[:2] *= ROUND[1]
        power[:2, :2] += (1 - ROUND[1]) * eye
        return float(np.abs(np.linalg.eigvals(power)).max())

    assert rule.preconditioner is not None
    matrix = np.stack([(rule.preconditioner @ column).numpy() for column in torch.eye(2)], axis=1)
    top = float(np.linalg.eigvals(matrix @ hessian).real.max())
    at_limit = rule.max_sharpness / top  # the multiple of the Hessian with that limit
    assert radius(0.995 * at_limit) <= 1 + 1e-9
    assert radius(1.005 * at_limit) > 1 + 1e-9


@pytest.mark.parametrize("decays", [(0.0, 1.0), (1.0, 1.01), (0.0, 0.02)])
def test_lookahead_over_decay_that_differs_much(decays: tuple[float, float]) -> None:
    """Catches a limit that is a quarter too low, and a check of the difference: decays of 1 and 1.01
    are as far off.
    """
    kinds = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    rule = UpdateRule.from_optimizer(lookahead_over_decays(kinds, decays))
    assert f"lr * weight_decay={LR * max(decays):.3g}" in str(rule.unknown)
    with pytest.raises(ValueError, match="no known limit where decoupled weight decay differs"):
        _ = rule.max_sharpness


@pytest.mark.parametrize("decays", [(0.0, 1.0), (0.0, 0.01)])
def test_two_lookaheads_of_different_decay(decays: tuple[float, float]) -> None:
    """Catches the joint rule of two optimizers, which contains the same factors."""
    kinds = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    both = [lookahead_over_decays(kinds, (decay, decay)) for decay in decays]
    assert (rule_of(both).unknown is None) == (max(decays) < 0.1)


def params_of(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("ratio", [1e-9, 0.3, 40.0])
def test_the_limit_of_sam(ratio: float) -> None:
    """Catches the edge of plain descent: Long & Bartlett (2023), theorem 1, for rho / norm = ratio."""
    lr = 0.1
    rule = UpdateRule(lr=lr, ascent=ratio)
    expected = (np.sqrt(1 + 8 * ratio / lr) - 1) / (2 * ratio)
    # For a tiny ratio their formula has the rounding of 1 / ratio.
    assert rule.max_sharpness == pytest.approx(expected, rel=1e-6)
    assert UpdateRule(lr=lr).max_sharpness == 20.0


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_real_sam(momentum: float) -> None:
    """Catches a gradient norm taken after the climb: along the top direction a step of the real class
    shrinks the parameters at 0.98 of the limit and grows them at 1.02.
    """
    kinds = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    rho, curvature = 0.3, torch.tensor([4.0, 1.0], dtype=torch.float64)
    start = torch.tensor([0.7, 0.0], dtype=torch.float64)
    ascent = rho / float((curvature * start).norm())
    # Where a mode of curvature 4 is at the edge: it steps as with 4 + ascent 4^2.
    edge = 2 * (1 + momentum) / (4.0 + ascent * 4.0**2)
    rule = UpdateRule(lr=edge, momentum=momentum, ascent=ascent)
    assert rule.max_sharpness == pytest.approx(4.0)
    for factor, grows in ((0.98, False), (1.02, True)):
        p = nn.Parameter(start.clone())
        optimizer = kinds.SAM([p], torch.optim.SGD, rho=rho, lr=edge * factor, momentum=momentum)
        assert "ascent=rho / norm" in str(UpdateRule.from_optimizer(optimizer).unknown)
        # At the edge signs alternate: the momentum m' = beta m + G is -m, so that m = -G / (1 + beta).
        climbed = curvature * (start + rho * start / start.norm())
        optimizer.state[p]["momentum_buffer"] = -climbed / (1 + momentum)
        gradient(p, curvature)
        optimizer.step(lambda p=p: gradient(p, curvature))
        assert (abs(float(p.detach()[0])) > 0.7) == grows


def gradient(p: nn.Parameter, curvature: Tensor) -> None:
    p.grad = curvature * p.detach()


def test_what_is_not_known_with_lookahead_or_ascent(
    network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Catches the inner rule's limit on the non-uniformity."""
    rule, quantities = UpdateRule(lr=0.1, lookahead=(5, 0.5)), ("sharpness", "non_uniformity")
    margins = measure(
        network, nn.MSELoss(), data, update_rule=rule, batch_size=2, quantities=quantities
    )
    assert margins.sharpness_limit == pytest.approx((1 + 3**0.2) / 0.1)
    assert margins.non_uniformity is not None
    assert margins.non_uniformity_limit is None
    batches = ("sharpness", "batch_sharpness")
    margins = measure(
        network, nn.MSELoss(), data, update_rule=rule, batch_size=2, quantities=batches
    )
    assert margins["batch_sharpness"].limit is None
    with pytest.raises(ValueError, match="not known with lookahead or ascent"):
        rule.max_non_uniformity(2)
    for options, message in (
        ({"lookahead": (0, 0.5)}, r"lookahead=\(0, 0\.5\)"),
        ({"lookahead": (5, 1.5)}, "alpha"),
        ({"ascent": -1.0}, "ascent=-1.0"),
        ({"ascent": 1.0, "lookahead": (5, 0.5)}, "with a preconditioner, groups or lookahead"),
    ):
        with pytest.raises(ValueError, match=message):
            UpdateRule(lr=0.1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"ascent": 0.3}, {"lookahead": (5, 0.5), "momentum": 0.5}])
def test_learning_rates_at_a_limit(options: dict[str, Any]) -> None:
    """Catches a limit inverted as if it were proportional to 1/lr: SAM's is not."""
    rule = UpdateRule(lr=0.1, **options)
    assert lr_at_limit(rule, rule.max_sharpness) == pytest.approx(0.1, rel=1e-9)
    decaying = UpdateRule(lr=0.1, lookahead=(5, 0.5), decoupled_weight_decay=0.1)
    with pytest.raises(ValueError, match=r"lookahead=\(5, 0\.5\) with decoupled weight decay"):
        lr_at_limit(decaying, 10.0)


def test_sinks_and_suggestions_of_lookahead(
    network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Catches a region with the inner optimizer's limits, or one that stops a sink, and its rates."""
    kinds = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    optimizer = kinds.Lookahead(torch.optim.Adam(network.parameters()), k=2)
    events: list[Any] = []

    class Sink:
        def receive(self, event: Any) -> None:
            events.append((event.region, event.record()))

    with StabilityMonitor(
        optimizer,
        network,
        nn.MSELoss(),
        data,
        every=1,
        batch_size=2,
        quantities=("sharpness", "non_uniformity"),
        sinks=[Sink()],
    ):
        nn.MSELoss()(network(data[0]), data[1]).backward()
        optimizer.step()
    ((region, record),) = events
    assert region is None
    assert record["preconditioned_sharpness_limit"] > 0
    assert "non_uniformity_limit" not in record
    with pytest.raises(TypeError, match="expected an Adam or AdamW"):
        suggest(network, nn.MSELoss(), data, optimizer=optimizer)


def test_limits_with_decay_and_ascent_have_closed_forms() -> None:
    """Catches the root of a negative number, and a lower limit without the ascent."""
    rule = UpdateRule(lr=0.1, weight_decay=2.0, ascent=0.07)
    # A mode h steps as h + ascent h^2 + decay: the factor is 1 at the lower limit, -1 at the upper.
    for limit, factor in ((rule.min_sharpness, 1.0), (rule.max_sharpness, -1.0)):
        effective = limit + 0.07 * limit**2 + 2.0
        assert 1 - 0.1 * effective == pytest.approx(factor, abs=1e-12)
    assert rule.min_sharpness == pytest.approx(-2.405, abs=1e-3)
    # The decay alone is unstable, and no curvature makes up for it.
    decaying = UpdateRule(lr=0.1, weight_decay=30.0, ascent=1.0)
    assert decaying.max_sharpness == -0.5
    margins = StabilityMargins(step=1, sharpness=1.0)
    measured = LRMeasured(margins, decaying, TargetRegion(sharpness=(0, 10.0)))
    assert gated_staircase(measured, {})[0].kind == "lower"
