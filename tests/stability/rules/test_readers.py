"""Every optimizer with a limit becomes unstable, by its real class, exactly at the limit of its rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from frozen_optimizer import TINY, Case, Frozen
from reader_cases import CASES, PACKAGED, installed
from torch import Tensor

from stableopt import UpdateRule, measure


def cases_at(*times: int) -> list[Any]:
    # L-BFGS has found the minimum after ten steps.
    params = [
        pytest.param(case, min(t, 8 if "LBFGS" in name else t), id=f"{name}, step {t}")
        for name, case in CASES.items()
        for t in times
    ]
    for name, case in PACKAGED.items():
        missing = pytest.mark.skipif(not installed(name), reason=f"needs {name.split('.')[0]}")
        params += [
            pytest.param(case, max(t, case.least), id=f"{name}, step {t}", marks=missing)
            for t in times
        ]
    return params


@pytest.mark.parametrize(("case", "t"), cases_at(3, 30))
def test_the_real_class_crosses_where_its_rule_says(case: Case, t: int) -> None:
    """Catches a wrong limit, a wrong preconditioner, a state entry read for another, a bias correction
    left out or made twice. At the critical rate the matrix of the real step has an eigenvalue of size 1,
    -1 without a filter, and none beyond, and all others are the roots of the rule's scalar modes; at
    0.98 of it real steps shrink, at 1.02 they grow.
    """
    frozen = Frozen(case, t)
    frozen.to_the_edge()
    rule = UpdateRule.from_optimizer(frozen.optimizer)
    values, vectors = torch.linalg.eig(frozen.matrix())
    # Columns have the rounding of steps of the order of 1e-9 next to preconditioners of up to 1e3;
    # roots that almost coincide are accurate to the root of the rounding only.
    assert float(values.abs().max()) == pytest.approx(1.0, abs=1e-6)
    if rule.filter is None:
        assert float((values + 1).abs().min()) < 1e-6
    if frozen.case.scalar:
        expected = scalar_roots(rule, frozen.preconditioned())
        assert float((values[:, None] - expected).abs().min(dim=1).values.max()) < 1e-5

    critical = vectors[:, values.abs().argmax()].real
    for factor, grows in ((0.98, False), (1.02, True)):
        frozen.rescale(factor)
        matrix = frozen.matrix()
        start = critical / critical[:8].norm()
        frozen.set(TINY * start)
        # Few steps where the distance is compared, so that it does not change the preconditioner.
        steps = 80 if rule.filter is None else 20
        for _ in range(steps):
            frozen.again()
        distance = float(frozen.theta.norm()) / TINY
        if rule.filter is None:
            # Without momentum 1.04^80 = 23 and 0.96^80 = 0.04; with it, both are further from 1.
            assert distance > 10 if grows else distance < 0.1
        else:
            # A filter may leave at a small angle, and slowly: the matrix of its steps grows.
            predicted = (torch.linalg.matrix_power(matrix, steps) @ start)[:8].norm()
            assert distance == pytest.approx(float(predicted), rel=1e-3)
            assert (float(torch.linalg.eigvals(matrix).abs().max()) > 1) == grows
        frozen.rescale(1 / factor)


def scalar_roots(rule: UpdateRule, matrix: Tensor) -> Tensor:
    """Return the roots of the mode of each eigenvalue of ``matrix``, and 0 for what repeats others."""
    step = rule.linear_step
    beta, c = rule.momentum, 1 - rule.lr * rule.decoupled_weight_decay
    direct, mean = (1.0, beta) if rule.nesterov else (1 - rule.momentum_share, rule.momentum_share)
    roots = [np.zeros(1 if rule.filter else 0)]
    for eigenvalue in torch.linalg.eigvals(matrix).real.tolist():
        k = rule.lr * (eigenvalue + step.weight_decay)
        if rule.filter is None:
            trace = c + beta - (direct + mean * (1 - rule.dampening)) * k
            roots.append(np.roots([1, -trace, beta * c - beta * direct * k]))
        else:
            num, den = rule.filter
            roots.append(np.roots(np.polymul([1, -c], den) + k * np.append(0.0, num)))
    return torch.from_numpy(np.concatenate(roots))


@pytest.mark.parametrize(("case", "t"), cases_at(3))
def test_measured_and_dense_preconditioned_sharpness_agree(case: Case, t: int) -> None:
    """Catches a preconditioner applied in another order of parameters than the Hessian's, a decay on
    the wrong side of it, or a root that is none.
    """
    frozen = Frozen(case, t)
    margins = measure(
        frozen.model,
        frozen.loss_fn,
        frozen.data,
        optimizer=frozen.optimizer,
        quantities=("sharpness",),
        tol=1e-10,
    )
    top = float(torch.linalg.eigvals(frozen.preconditioned()).real.max())
    if not UpdateRule.from_optimizer(frozen.optimizer).preconditioned:
        assert margins.sharpness_ratio == pytest.approx(frozen.ratio(), rel=1e-8)
        return
    assert margins.preconditioned_sharpness == pytest.approx(top, rel=1e-8)
    assert margins.preconditioned_sharpness_ratio == pytest.approx(frozen.ratio(), rel=1e-8)
    assert margins.sharpness == pytest.approx(
        float(torch.linalg.eigvalsh(frozen.hessian)[-1]), rel=1e-8
    )
    assert margins.sharpness_limit is None
    assert margins.stable == (frozen.ratio() <= 1)
