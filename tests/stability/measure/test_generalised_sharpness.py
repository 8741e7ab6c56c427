"""The generalised sharpness against brute force over vertices, Frank-Wolfe, and closed forms."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stableopt
from stableopt import Problem, StabilityMargins, StabilityMonitor, UpdateRule, measure
from stableopt.curvature import Hessian, NonFiniteError, Operator
from stableopt.sinks.tensorboard import layout
from stableopt.stability import (
    NewtonSchulzNorm,
    NormedStep,
    QuantityResult,
    SignNorm,
    SpectralNorm,
    StepNorm,
    generalised_sharpness,
)
from stableopt.stability.measure.generalised_sharpness import GeneralisedSharpness, search

DOUBLE = torch.float64

PLAIN: dict[str, Any] = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
EXACT: dict[str, Any] = {"ns_coefficients": (15 / 8, -10 / 8, 3 / 8), "ns_steps": 12}
"""Muon whose steps are polar factors of the gradient."""


class Dense(Operator):
    """A matrix that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.count = matrix, 0

    def product(self, vector: Tensor) -> Tensor:
        self.count += 1
        return self.matrix @ vector


class SignSGD(torch.optim.Optimizer):
    """Sign descent."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


def read_signs(optimizer: SignSGD) -> UpdateRule:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    lr = optimizer.param_groups[0]["lr"]
    return UpdateRule(lr=lr, preconditioner=NormedStep(SignNorm(params, lr=lr), "SignSGD"))


def symmetric(size: int, seed: int) -> Tensor:
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return (drawn + drawn.T) / 2


def maximised(
    matrix: Tensor, norm: StepNorm, seed: int = 0, **options: Any
) -> GeneralisedSharpness:
    gradient = torch.randn(
        len(matrix), generator=torch.Generator().manual_seed(seed + 1), dtype=DOUBLE
    )
    arguments = {"tol": 1e-6, "max_iter": 200, "seed": seed, **options}
    return search(Dense(matrix), gradient, norm, **arguments)


def over_faces(matrix: Tensor, radii: Tensor) -> float:
    """Return the largest d^T H d in a box: at a vertex, or the stationary point of a face."""
    scaled, best = radii.outer(radii) * matrix, 0.0
    for face in itertools.product([1.0, -1.0, 0.0], repeat=len(matrix)):
        d = torch.tensor(face, dtype=DOUBLE)
        free = d == 0
        if free.any():
            block = scaled[free][:, free]
            if float(torch.linalg.eigvalsh(block)[-1]) >= 0:
                continue
            d[free] = -torch.linalg.solve(block, scaled[free][:, ~free] @ d[~free])
        if float(d.abs().max()) <= 1:
            best = max(best, float(d @ scaled @ d))
    return best


def test_signs_against_all_faces() -> None:
    """Catches an ascent that stops early, leaves the ball, or sees only its vertices."""
    for seed in range(6):
        size = 5
        matrix = symmetric(size, seed) - (seed // 2) * torch.eye(size, dtype=DOUBLE)
        radii = (
            torch.ones(size, dtype=DOUBLE) if seed % 2 else torch.linspace(0.5, 2, size).double()
        )
        best = over_faces(matrix, radii)
        found = maximised(matrix, SignNorm([torch.zeros(size)], [radii], lr=0.1), seed)
        assert found.value <= best * (1 + 1e-12)
        # The ascent ends at gains of 1e-7, and later ones are about ten times as large together.
        assert found.value >= best * (1 - 1e-5)
        assert float((found.maximiser / radii).abs().max()) <= 1 + 1e-12
        value = float(found.maximiser @ matrix @ found.maximiser)
        assert found.value == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("diagonal", "best"), [((4.0, -1.0), 4.0), ((1.0, -10.0), 1.0), ((-1.0, -2.0), 0.0)]
)
def test_negative_curvature_lowers_no_maximum(diagonal: tuple[float, float], best: float) -> None:
    """Catches a value below that at the centre or on a face, where the others are signs."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=DOUBLE))
    for starts in (0, 4):
        found = maximised(matrix, SignNorm([torch.zeros(2)], lr=0.1), starts=starts)
        assert found.value == pytest.approx(best)
        assert found.converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_positive_curvature_the_search_ends(dtype: torch.dtype) -> None:
    """Catches gains compared with a value that tends to zero, and a value that is a sum of roundings."""
    drawn = torch.randn(200, 200, generator=torch.Generator().manual_seed(0), dtype=dtype)
    matrix = -(drawn @ drawn.T) / 200 - torch.eye(200, dtype=dtype)
    gradient = torch.ones(200, dtype=dtype)
    found = search(
        Dense(matrix),
        gradient,
        SignNorm([torch.zeros(200)], lr=0.1),
        tol=1e-3,
        max_iter=100,
        seed=0,
    )
    assert found.value == 0.0
    assert found.converged
    assert found.products < 150


def test_an_approximate_oracle_at_zero_gradient() -> None:
    """Catches an iteration that starts at the oracle of zero, which is zero."""
    norm = NewtonSchulzNorm([torch.zeros(2, 2)], lr=0.1)
    matrix, zero = 2 * torch.eye(4, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE)
    found = search(Dense(matrix), zero, norm, tol=1e-3, max_iter=100, seed=0)
    # Newton-Schulz gives singular values around 1, so that the value is around 4.
    assert 2.0 < found.value < 6.0


def frank_wolfe(matrix: Tensor, norm: StepNorm, shapes: list[torch.Size], start: Tensor) -> float:
    """Return the best of 50 Frank-Wolfe steps of size 2/(k+2), as in arXiv:2603.05002."""
    sizes, d, best = [shape.numel() for shape in shapes], start, -math.inf
    for k in range(50):
        parts = [v.view(s) for v, s in zip((matrix @ d).split(sizes), shapes, strict=True)]
        vertex = torch.cat([t.reshape(-1) for t in norm.oracle(parts)])
        d = d + 2 / (k + 2) * (vertex - d)
        best = max(best, float(d @ matrix @ d), float(vertex @ matrix @ vertex))
    return best


@pytest.mark.parametrize("definite", [True, False])
def test_never_below_frank_wolfe(definite: bool) -> None:
    """Catches a maximiser of spectral norms that is worse than the published one, over two layers."""
    shapes = [torch.Size([4, 3]), torch.Size([2, 4])]
    params = [torch.zeros(shape) for shape in shapes]
    norm = SpectralNorm(params, [1.0, 0.7], lr=0.1)
    for seed in range(2):
        matrix = symmetric(20, seed)
        matrix = matrix @ matrix if definite else matrix
        starts = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        reference = max(frank_wolfe(matrix, norm, shapes, start) for start in starts)
        result = maximised(matrix, norm, seed, starts=6)
        # The ascent ends at gains of 1e-7, and later ones are about ten times as large together.
        assert result.value >= reference * (1 - 1e-5)
        parts = [v.view(s) for v, s in zip(result.maximiser.split([12, 8]), shapes, strict=True)]
        for part, radius in zip(parts, [1.0, 0.7], strict=True):
            assert float(torch.linalg.matrix_norm(part, 2)) <= radius + 1e-12
        assert result.value == pytest.approx(float(result.maximiser @ matrix @ result.maximiser))


def test_one_layer_is_its_top_singular_value() -> None:
    """H = vec(A) vec(A)^T: S is the squared nuclear norm of A, times r^2 for a radius r."""
    a = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    nuclear = float(torch.linalg.matrix_norm(a, "nuc"))
    result = maximised(torch.outer(a.reshape(-1), a.reshape(-1)), SpectralNorm([a], [2.0], lr=0.5))
    assert result.value == pytest.approx((2 * nuclear) ** 2)
    assert result.limit == pytest.approx(2 * result.dual_norm / 0.5)
    assert result.ratio == pytest.approx(result.value / result.limit)


def test_block_values_do_not_add_up() -> None:
    """Catches layers maximised one by one: off-diagonal blocks count."""
    params = [torch.zeros(2), torch.zeros(2)]
    matrix = torch.ones(4, 4, dtype=DOUBLE)
    assert maximised(matrix, SignNorm(params, lr=1.0)).value == pytest.approx(16.0)  # not 4 + 4


def network(seed: int = 0) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    x = torch.randn(40, 6, dtype=DOUBLE)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, nn.MSELoss(), (x, torch.sin(x[:, :2]))


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, data: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()


UpdateRule.register(SignSGD, read_signs)


@pytest.mark.filterwarnings("ignore:.*length that does not depend:RuntimeWarning")
def test_sign_descent_settles_at_its_edge() -> None:
    """The ratio is 1 where sign descent oscillates, at a sharpness far below 2/lr."""
    model, loss_fn, data = network()
    optimizer = SignSGD(model.parameters(), lr=3e-3)
    trained(optimizer, model, data, 250)
    ratios = []
    for _ in range(3):
        trained(optimizer, model, data, 7)
        margins = measure(
            model,
            loss_fn,
            data,
            optimizer=optimizer,
            tol=0.03,
            quantities=("sharpness", "generalised_sharpness"),
        )
        result = margins["generalised_sharpness"]
        ratios.append(result.ratio)
        assert margins.sharpness < 0.1 * 2 / 3e-3
        assert margins.sharpness_limit is None
    # On digits it ends at 1.0 to 1.2; a small network's gradient jumps more from step to step.
    assert 0.7 < sorted(ratios)[1] < 1.5


@pytest.mark.filterwarnings("ignore:.*length that does not depend:RuntimeWarning")
def test_tracking_starts_at_the_last_maximiser() -> None:
    """Catches random starts at each measurement, whose products a monitor would pay for."""
    model, loss_fn, data = network()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=0.02, **PLAIN, **EXACT)
    names = ("generalised_sharpness",)
    with StabilityMonitor(
        muon, model, loss_fn, data, params=matrices, every=10, quantities=names
    ) as monitor:
        trained(muon, model, data, 20)
    first, *later = [m["generalised_sharpness"].measurement for m in monitor.history]
    assert all(m.products < first.products / 2 for m in later)
    record = monitor.margins.record()
    assert record["generalised_sharpness_ratio"] == pytest.approx(
        record["generalised_sharpness"] / record["generalised_sharpness_limit"]
    )
    cold = generalised_sharpness(
        Problem(model, loss_fn, data, params=matrices), monitor.update_rule.norm
    )
    # The monitor follows each ascent to 3 %.
    assert record["generalised_sharpness"] == pytest.approx(cold.value, rel=0.03)


def test_parameters_of_other_optimizers_stay() -> None:
    """With Muon for the matrices alone, biases are held fixed and the value is that of the matrices."""
    model, loss_fn, data = network()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norm = SpectralNorm(matrices, lr=0.1)
    all_params = generalised_sharpness(Problem(model, loss_fn, data), norm, starts=0)
    only_matrices = generalised_sharpness(
        Problem(model, loss_fn, data, params=matrices), norm, starts=0
    )
    # The same ascent from the gradient's oracle, with zeros for the biases.
    assert all_params.value == pytest.approx(only_matrices.value, rel=1e-6)
    assert all_params.dual_norm == pytest.approx(only_matrices.dual_norm)
    sizes = [p.numel() for p in model.parameters()]
    assert float(all_params.maximiser.split(sizes)[1].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("adjust", "radius"), [(None, 2.0), ("original", 2.0), ("match_rms_adamw", 0.8)]
)
def test_muon_radii_are_those_of_its_steps(adjust: str | None, radius: float) -> None:
    """Catches radii that are not the real class's: the largest singular value of a step, over lr."""
    weight = nn.Parameter(torch.zeros(16, 4))
    slow = nn.Parameter(torch.zeros(4, 16))
    groups = [{"params": [weight]}, {"params": [slow], "lr": 0.05}]
    muon = torch.optim.Muon(
        groups, lr=0.1, adjust_lr_fn=adjust, **PLAIN, **{**EXACT, "ns_steps": 20}
    )
    for p in (weight, slow):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    norm = UpdateRule.from_optimizer(muon).norm
    assert isinstance(norm, SpectralNorm)
    assert norm.radii[0] == pytest.approx(radius)
    steps = norm.oracle([weight.grad, slow.grad])
    muon.step()
    for p, step in zip((weight, slow), steps, strict=True):
        # Muon computes polar factors in bfloat16, with 8 bits.
        torch.testing.assert_close(p.detach(), -norm.lr * step, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("coefficients", [{}, EXACT], ids=["its own", "exact"])
def test_muon_at_the_edge_has_a_ratio_of_one(coefficients: dict[str, Any]) -> None:
    r"""Catches a limit of the polar factor for steps that are not: 1.42 with torch's coefficients.

    A run of one number and curvature h that goes back and forth between both sides of its minimum is at
    the edge, and stays there at any length of its steps.
    """
    model = nn.Linear(1, 1, bias=False)
    muon = torch.optim.Muon(model.parameters(), lr=0.1, **PLAIN, **coefficients)
    data = torch.full((1, 1), 3.0), torch.zeros(1, 1)
    problem = Problem(model, nn.MSELoss(), data)
    norm = UpdateRule.from_optimizer(muon).norm
    assert type(norm) is (SpectralNorm if coefficients else NewtonSchulzNorm)
    (length,) = norm.oracle([torch.ones(1, 1)])
    with torch.no_grad():
        model.weight.copy_(0.05 * length)
    result = generalised_sharpness(problem, norm)
    # One number is a vertex of the ball, found exactly up to rounding.
    assert result.ratio == pytest.approx(1, rel=1e-5)
    assert result.converged
    before = model.weight.item()
    nn.MSELoss()(model(data[0]), data[1]).backward()
    muon.step()
    # Muon computes in bfloat16, with 8 bits, and a step is twice the distance.
    assert model.weight.item() == pytest.approx(-before, rel=5e-2)


def test_the_map_is_torchs_and_what_is_measured_reproduces_itself() -> None:
    """Catches another polynomial, and a maximum over its image, which no run reaches."""
    model, loss_fn, data = network()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=0.02, **PLAIN)
    trained(muon, model, data, 10)
    norm = UpdateRule.from_optimizer(muon).norm
    assert isinstance(norm, NewtonSchulzNorm)
    before = [p.detach().clone() for p in matrices]
    problem = Problem(model, loss_fn, data, params=matrices)
    step = norm.oracle(problem.unflatten(problem.gradient()))
    result = generalised_sharpness(problem, norm)
    trained(muon, model, data, 1)
    for p, start, direction in zip(matrices, before, step, strict=True):
        # In bfloat16, with 8 bits, and five iterations.
        torch.testing.assert_close((start - p.detach()) / 0.02, direction, rtol=0.1, atol=0.05)
    image = Hessian(problem) @ result.maximiser
    next_maximiser = torch.cat([d.reshape(-1) for d in norm.oracle(problem.unflatten(image))])
    # The next value is as near to the mean of the last as they are to each other.
    assert float(next_maximiser @ (Hessian(problem) @ next_maximiser)) == pytest.approx(
        result.value, rel=0.15
    )
    largest = generalised_sharpness(problem, SpectralNorm(matrices, norm.radii, lr=0.02))
    assert result.value < largest.value * 1.2**2


def test_rprop_radii_are_its_step_sizes() -> None:
    """Catches one radius for all entries: Rprop has one for each, and they change."""
    weight = nn.Parameter(torch.zeros(3))
    rprop = torch.optim.Rprop([weight], lr=0.1)
    before = UpdateRule.from_optimizer(rprop).norm
    assert before is not None
    torch.testing.assert_close(before.radii[0], torch.full((3,), 0.1))
    for slope in ([1.0, 1.0, -1.0], [1.0, -1.0, -1.0]):
        weight.grad = torch.tensor(slope)
        rprop.step()
    after = UpdateRule.from_optimizer(rprop).norm
    assert after is not None
    torch.testing.assert_close(after.radii[0], torch.tensor([0.12, 0.05, 0.12]))


def test_arguments() -> None:
    model, loss_fn, data = network()
    problem, params = Problem(model, loss_fn, data), list(model.parameters())
    with pytest.raises(ValueError, match="lr=-1"):
        SignNorm(params, lr=-1.0)
    with pytest.raises(ValueError, match=r"radii has 1 values: expected one for each of the 4"):
        SignNorm(params, [1.0], lr=1.0)
    with pytest.raises(ValueError, match="expected a number"):
        SpectralNorm(params[:1], [torch.ones(5, 6)], lr=1.0)
    with pytest.raises(ValueError, match="is negative"):
        SignNorm(params[:1], [-1.0], lr=1.0)
    with pytest.raises(ValueError, match="no parameter of the problem has a radius"):
        generalised_sharpness(problem, SignNorm([torch.zeros(2)], lr=1.0))
    with pytest.raises(ValueError, match="starts=-1"):
        generalised_sharpness(problem, SignNorm(params, lr=1.0), starts=-1)
    with pytest.raises(ValueError, match="needs an optimizer whose steps have a length"):
        measure(problem, lr=0.1, quantities=("generalised_sharpness",))
    with pytest.raises(ValueError, match="length that does not depend on the gradient"):
        _ = read_signs(SignSGD(params, lr=0.1)).max_sharpness
    assert generalised_sharpness(problem, SignNorm(params, lr=0.0), starts=0).limit == math.inf


@pytest.mark.filterwarnings("ignore:.*length that does not depend:RuntimeWarning")
def test_numbers_that_are_not_finite() -> None:
    """Catches a search that never ends, or a value of nan."""
    model, loss_fn, (x, y) = network()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    rule = read_signs(SignSGD(model.parameters(), lr=0.1))
    margins = measure(
        model, loss_fn, (x, y), update_rule=rule, quantities=("generalised_sharpness",)
    )
    assert "not finite" in str(margins.failure)
    matrix = torch.full((3, 3), math.inf, dtype=DOUBLE)
    with pytest.raises(NonFiniteError):
        maximised(matrix, SignNorm([torch.zeros(3)], lr=1.0))


def test_zero_gradient() -> None:
    """At a stationary point no step length is short enough: the ratio is infinite."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    data = torch.eye(2, dtype=DOUBLE), torch.zeros(2, 1, dtype=DOUBLE)
    problem = stableopt.Problem(model, nn.MSELoss(), data)
    result = generalised_sharpness(problem, SignNorm(model.parameters(), lr=0.1))
    assert result.value == pytest.approx(2.0)
    assert result.limit == 0
    assert result.ratio == math.inf


def test_its_chart_is_among_the_custom_scalars(tmp_path: Path) -> None:
    """Catches a quantity without a chart where it is measured, or with one where it is not."""
    results = {"generalised_sharpness": QuantityResult(value=3.0, limit=4.0)}
    sink = stableopt.TensorBoardSink(tmp_path, max_diagrams=0)
    sink(1, StabilityMargins(step=1, results=results).record())
    sink.close()
    measured, unmeasured = (
        {tag for _, tags in charts.values() for tag in tags}
        for charts in (
            layout({"generalised_sharpness"})["edge of stability"],
            layout(())["edge of stability"],
        )
    )
    assert {"stability/gen_sharp_ratio", "stability/gen_sharp_value"} <= measured - unmeasured
