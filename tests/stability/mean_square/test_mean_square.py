"""Exact mean-square stability: closed forms, all subsets, dense recursions, and simulated runs."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from sample_factors import factors
from torch import Tensor

from stableopt import UpdateRule, critical_batch_size, critical_lr
from stableopt.curvature import DualCurvature
from stableopt.curvature.gram.gram import Modes
from stableopt.stability import LinearStep, mean_square_radius, noise_factor
from stableopt.stability.mean_square.crossing import root
from stableopt.stability.mean_square.second_moments import NoiseGain, gather, mode_weights

PLAIN = UpdateRule(lr=1.0)
RULES = {
    "plain": PLAIN,
    "heavy ball": UpdateRule(lr=1.0, momentum=0.9),
    "dampened": UpdateRule(lr=1.0, momentum=0.8, dampening=0.8),
    "nesterov": UpdateRule(lr=1.0, momentum=0.9, nesterov=True),
    "decay": UpdateRule(lr=1.0, weight_decay=0.3),
    "nesterov with decay": UpdateRule(lr=1.0, momentum=0.6, nesterov=True, weight_decay=0.2),
}


def dual(rows: Tensor) -> DualCurvature:
    return DualCurvature.from_factors(rows)


def step_matrices(h: Tensor, rule: UpdateRule, lr: float) -> Tensor:
    """Return the step's matrix on (x, buffer) for a batch with Hessian ``h``, as torch.optim.SGD
    reads: decay into the gradient, gradient into the buffer, buffer into the step.
    """
    d = len(h)
    eye, zero = torch.eye(d).double(), torch.zeros(d, d).double()
    gradient = torch.cat([h + rule.weight_decay * eye, zero], dim=1)
    x, buffer = torch.cat([eye, zero], dim=1), torch.cat([zero, eye], dim=1)
    if rule.momentum == 0:
        return torch.cat([x - lr * gradient, zero.repeat(1, 2)])
    new = rule.momentum * buffer + (1 - rule.dampening) * gradient
    along = gradient + rule.momentum * new if rule.nesterov else new
    return torch.cat([x - lr * along, new])


def growth(rows: Tensor, batch_size: int, rule: UpdateRule, lr: float) -> float:
    """Return the growth of all second moments in a step, over every subset: the definition."""
    hessians = rows.mT @ rows
    steps = [
        step_matrices(hessians[list(subset)].mean(0), rule, lr)
        for subset in combinations(range(len(rows)), batch_size)
    ]
    moments = torch.stack([torch.kron(m, m) for m in steps]).mean(0)
    return float(torch.linalg.eigvals(moments).abs().max())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_all_subsets_grow_above_and_not_below(name: str, batch_size: int) -> None:
    """Catches any error in the recursion, its weights, p, or the search: with every subset of tiny
    data, second moments shrink just below the critical rate and grow just above, for each rule.
    """
    rule, rows = RULES[name], factors(n=5, outputs=2, d=3)
    critical = critical_lr(dual(rows), batch_size, update_rule=rule, tol=1e-7)
    assert critical.converged
    assert critical.exact
    # 1e-6 on either side of it: the accuracy that is claimed.
    assert growth(rows, batch_size, rule, critical.value * (1 - 1e-6)) < 1
    assert growth(rows, batch_size, rule, critical.value * (1 + 1e-6)) > 1
    assert 0.95 * critical.value < critical.lower <= critical.value
    assert growth(rows, batch_size, rule, critical.lower) <= 1 + 1e-12


def test_directions_without_curvature_do_not_matter() -> None:
    """Catches modes made of rounding, with more parameters than rows or with dependent rows; the
    definition gives the answer in the remaining directions.
    """
    rows = factors(n=4, outputs=2, d=3)
    rotation = torch.linalg.qr(factors(n=1, outputs=30, d=30, seed=1)[0]).Q[:3]
    wide = rows @ rotation
    wide[3] = wide[2]
    rows[3] = rows[2]
    critical = critical_lr(dual(wide), 2, tol=1e-7)
    assert len(dual(wide).modes.eigenvalues) == 3
    assert growth(rows, 2, PLAIN, critical.value * (1 - 1e-6)) < 1
    assert growth(rows, 2, PLAIN, critical.value * (1 + 1e-6)) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_diagonal_samples_in_closed_form(batch_size: int) -> None:
    """eta* = min_k 2 a_k / (a_k^2 + p s_k^2), and Theorem 1's is the same. Catches a search that stays
    in the direction in which it began: the map does not mix them.
    """
    curvature = torch.tensor(
        [[4.0, 1, 2], [0, 1, 2], [1, 1, 7], [1, 1, 0], [2, 1, 1], [1, 9, 0]]
    ).double()
    rows = torch.diag_embed(curvature.sqrt())
    a, s2 = curvature.mean(0), curvature.var(0, correction=0)
    p = noise_factor(batch_size, 6)
    expected = float((2 * a / (a**2 + p * s2)).min())
    critical = critical_lr(dual(rows), batch_size, tol=1e-7)
    assert critical.value == pytest.approx(expected, rel=1e-6)
    assert critical.theorem1 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_orthogonal_samples_in_closed_form(batch_size: int) -> None:
    """eta* = 2B/k_max, a = k_max/n, s = k_max sqrt(n-1)/n. Catches p for n instead of n - 1."""
    sizes = torch.tensor([1.0, 5.0, 2.0, 0.5, 3.0]).double()
    critical = critical_lr(dual(torch.diag(sizes.sqrt()).unsqueeze(1)), batch_size, tol=1e-7)
    assert critical.value == pytest.approx(2 * batch_size / 5, rel=1e-6)
    assert critical.sharpness == pytest.approx(1.0, rel=1e-12)
    curvature = DualCurvature(torch.diag(sizes), 5)
    assert curvature.non_uniformity == pytest.approx(5 * 2 / 5, rel=1e-12)


def test_parallel_samples_in_closed_form() -> None:
    """J_i = alpha_i v: eta* = 2 m2 / (m2^2 + p (m4 - m2^2)), m_k the mean of alpha^k. Catches a factor
    that loses the scale of a sample.
    """
    alpha = torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
    direction = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    m2, m4 = float((alpha**2).mean()), float((alpha**4).mean())
    for batch_size in (1, 2, 4):
        p = noise_factor(batch_size, 4)
        critical = critical_lr(
            dual((alpha[:, None] * direction).unsqueeze(1)), batch_size, tol=1e-7
        )
        assert critical.value == pytest.approx(2 * m2 / (m2**2 + p * (m4 - m2**2)), rel=1e-9)


def test_the_box_is_not_necessary() -> None:
    """J = (1,1), (1,-1), (1,0): Theorem 1 gives 1, the box 1/s = 1.06066, and 1.10102 is stable.
    Catches a sufficient condition given out as the exact one.
    """
    rows = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]], [[1.0, 0.0]]])
    critical = critical_lr(dual(rows), 1, tol=1e-8)
    assert critical.theorem1 == pytest.approx(1.0, abs=1e-12)
    assert 1 / dual(rows).non_uniformity == pytest.approx(1.06066, abs=1e-5)
    assert critical.value == pytest.approx(1.10102, abs=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_the_full_batch_has_the_rules_own_limit(name: str) -> None:
    """Catches noise where there is none, and a limit that is not that of max_sharpness: at B = n, and
    with batch_size None. A batch size that is given counts also for a rule of full batches.
    """
    rule, rows = RULES[name], factors()
    full = critical_lr(dual(rows), 6, update_rule=rule)
    at_edge = UpdateRule(
        full.value, rule.momentum, rule.dampening, rule.nesterov, rule.weight_decay
    )
    assert at_edge.max_sharpness == pytest.approx(dual(rows).sharpness, rel=1e-12)
    assert full.lower == full.value == full.full_batch
    assert critical_lr(dual(rows), None, update_rule=rule).value == full.value
    descent = UpdateRule(1.0, full_batch=True)
    assert critical_lr(dual(rows), None, update_rule=descent).value == 2 / dual(rows).sharpness
    assert critical_lr(dual(rows), 1, update_rule=descent) == critical_lr(dual(rows), 1)


@pytest.mark.parametrize("name", RULES)
def test_it_never_falls_as_batches_grow_and_batch_sizes_follow(name: str) -> None:
    """Catches a p that grows with B, a bracket upside down, and a batch size that is off by one: the
    smallest at a rate must allow it, and the one below must not.
    """
    rule, rows = RULES[name], factors(n=7)
    thresholds = [critical_lr(dual(rows), b, update_rule=rule, tol=1e-6) for b in range(1, 8)]
    values = [t.value for t in thresholds]
    assert values == sorted(values)
    assert all(t.theorem1 is None or t.theorem1 <= t.value * (1 + 1e-9) for t in thresholds)
    assert all(t.lower <= t.value <= t.full_batch for t in thresholds)
    for size, value in enumerate(values, start=1):
        assert critical_batch_size(dual(rows), value, update_rule=rule) == size
        above = critical_batch_size(dual(rows), value * 1.0001, update_rule=rule)
        assert above == (size + 1 if size < 7 else None)


def test_a_data_set_beyond_the_samples_given() -> None:
    """Catches n of the probe set in p: a thousand copies of each sample have their own n, and so the
    same critical rate.
    """
    rows = factors(n=3, outputs=1, d=2)
    many = dual(rows.repeat(20, 1, 1))
    probe = critical_lr(dual(rows), 2, dataset_size=60, tol=1e-7)
    assert probe.value == pytest.approx(critical_lr(many, 2, tol=1e-7).value, rel=1e-9)
    assert critical_batch_size(dual(rows), probe.value, dataset_size=60) == 2


@pytest.mark.parametrize("name", RULES)
def test_weights_against_the_pair_recursion(name: str) -> None:
    """Catches a slip in the closed forms: for pairs of modes, the stationary moment that unit noise
    keeps up is a 4 x 4 solve. Small curvatures included, at which Nesterov's formula cancels.
    """
    rule, lr = RULES[name], 0.7
    edge = UpdateRule(lr, rule.momentum, rule.dampening, rule.nesterov).max_sharpness
    h = edge * torch.tensor([1e-3, 0.1, 0.4, 0.8, 0.99], dtype=torch.float64)
    step = LinearStep(lr, rule.momentum, rule.dampening, rule.nesterov)
    weights = mode_weights(h[:, None], h, step)
    bare = UpdateRule(lr, rule.momentum, rule.dampening, rule.nesterov)
    zero = step_matrices(torch.zeros(1, 1).double(), bare, lr)
    noise = (step_matrices(torch.ones(1, 1).double(), bare, lr) - zero)[:, 0]
    for i, a in enumerate(h):
        for j, b in enumerate(h):
            left = step_matrices(a.view(1, 1), bare, lr)
            right = step_matrices(b.view(1, 1), bare, lr)
            moments = torch.linalg.solve(
                torch.eye(4).double() - torch.kron(left, right), torch.kron(noise, noise)
            )
            # The solve loses four digits near the edge, where moments are large.
            assert float(weights[i, j] * moments[0]) == pytest.approx(1.0, rel=1e-9)


def test_nesterov_at_vanishing_curvature() -> None:
    """Catches the cancellation: at h of 1e-14, w -> (1 - beta)(h_a + h_b)/eta, and never below 0."""
    h = torch.tensor([1e-14, 3e-9, 2e-16], dtype=torch.float64)
    for beta in (0.1, 0.9, 0.99):
        weights = mode_weights(h[:, None], h, LinearStep(0.5, beta, nesterov=True))
        # To first order in h: the next is 1e-9 / (1 - beta)^2.
        assert torch.allclose(weights, (1 - beta) * (h[:, None] + h) / 0.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("nesterov", [False, True])
def test_weights_fall_with_the_rate_and_are_a_positive_kernel(nesterov: bool, decay: float) -> None:
    """Catches a rule with more than one crossing, or whose lower bound is not one: the search
    relies on both.
    """
    h = torch.logspace(-5, 0, 30, dtype=torch.float64)
    for beta in (0.05, 0.5, 0.9, 0.99):
        edge = UpdateRule(1.0, beta, nesterov=nesterov).max_sharpness / (1 + decay)
        raised = h + decay
        before = None
        for share in torch.linspace(0.01, 0.999, 60).tolist():
            w = mode_weights(
                raised[:, None], raised, LinearStep(share * edge, beta, nesterov=nesterov)
            )
            assert bool((w > 0).all())
            assert before is None or bool((w < before).all())
            before = w
            for p in (0.0, 0.3, 1.0):
                kernel = 1 / (w + p * h[:, None] * h)
                scale = kernel.diagonal().rsqrt()
                least = torch.linalg.eigvalsh(kernel * scale[:, None] * scale)[0]
                assert float(least) > -1e-12  # rounding of entries of size 1


@pytest.mark.parametrize("name", RULES)
def test_one_mode_is_the_scalar_recursion(name: str) -> None:
    """Catches a disagreement with mean_square_radius, in which one number takes each matrix's place."""
    rule = RULES[name]
    curvature = torch.tensor([1.0, 2.0, 6.0]).double()
    for batch_size in (1, 2):
        critical = critical_lr(
            dual(curvature.sqrt().view(3, 1, 1)), batch_size, update_rule=rule, tol=1e-7
        )
        noise = noise_factor(batch_size, 3) * float(curvature.var(correction=0))
        radius = mean_square_radius(
            3.0,
            noise,
            critical.value,
            momentum=rule.momentum,
            dampening=rule.dampening,
            nesterov=rule.nesterov,
            weight_decay=rule.weight_decay,
        )
        assert radius == pytest.approx(1.0, abs=1e-8)


def test_noise_gain_is_its_definition() -> None:
    """Catches a sum over the wrong index: sample by sample, with loops, and symmetric as a matrix."""
    rows = factors(n=3, outputs=2, d=4)
    modes = Modes.from_factors(rows)
    h, p = modes.eigenvalues, 0.4
    weights = mode_weights(h[:, None], h, LinearStep(0.1)) + p * h[:, None] * h
    gain = NoiseGain(modes, weights, p)
    s = factors(n=3, outputs=2, d=2, seed=3)
    gathered = sum(f.T @ block @ f for f, block in zip(modes.factors, s, strict=True))
    expected = [p / 3 * f @ (gathered / weights) @ f.T for f in modes.factors]
    assert torch.allclose(gather(modes.factors, s.flatten()), gathered)
    assert torch.allclose(gain @ s.flatten(), torch.stack(expected).flatten())
    matrix = gain @ torch.eye(12, dtype=torch.float64)
    assert torch.allclose(matrix, matrix.T)


def test_scalar_roots() -> None:
    """Catches a secant that leaves its bracket: steep, flat, beyond the end, and never reached."""
    assert root(lambda t: t**40 / 3, 100.0) == pytest.approx(3 ** (1 / 40), rel=1e-12)
    assert root(lambda t: 1e-6 * t, 1e9) == pytest.approx(1e6, rel=1e-12)
    assert root(lambda t: 1 / (2.0 - t) - 0.5 + 1e-3 * t, 1.9) < 1.9
    assert root(lambda t: 0.5 * t, 1.0) == 1.0
    assert root(lambda t: 0.0, 7.0) == 7.0


@pytest.mark.parametrize("name", ["plain", "heavy ball", "nesterov"])
def test_the_mean_over_simulated_steps_grows_above_and_not_below(name: str) -> None:
    """Catches an expectation that is not that of SGD as it runs: torch's optimizer on the linearised
    model, 3,000 walkers from random places with random batches; their mean square over 60 steps.
    Means of products of random factors are carried by ever fewer walkers, so the steps must be few.
    """
    generator = torch.Generator().manual_seed(0)
    rule = RULES[name]
    rows = factors(n=4, outputs=1, d=2, seed=5).squeeze(1)
    value = critical_lr(dual(rows.unsqueeze(1)), 2, update_rule=rule).value
    walkers = 3000

    def mean_square(lr: float) -> list[float]:
        x = torch.randn(walkers, 2, generator=generator, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.SGD([x], lr=lr, momentum=rule.momentum, nesterov=rule.nesterov)
        means = []
        for _ in range(60):
            order = torch.rand(walkers, 4, generator=generator).argsort(1)[:, :2]
            outputs = (rows[order] * x.unsqueeze(1)).sum(2)
            optimizer.zero_grad()
            (outputs.square().mean(1) / 2).sum().backward()
            optimizer.step()
            means.append(float(x.detach().square().sum(1).mean()))
        return means

    below, above = mean_square(0.7 * value), mean_square(1.3 * value)
    assert sum(below[-10:]) < sum(below[10:20])
    assert sum(above[-10:]) > sum(above[10:20])
