"""``stableopt.LBFGS`` against its oracles: torch bit for bit, the textbook's matrix, and SciPy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import bfgs_inverse
from scipy import optimize
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import stableopt
from stableopt.optim.lbfgs.compact import CompactPairs
from stableopt.optim.lbfgs.two_loop import TwoLoopPairs

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(20, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(20, 2, generator=GENERATOR, dtype=torch.float64)

SEARCHES: list[str | None] = [None, "strong_wolfe"]
DIRECTIONS = ["compact", "two_loop"]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def closure_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float] | None = None
) -> Callable[[], Tensor]:
    dtype = next(model.parameters()).dtype

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X.to(dtype)), Y.to(dtype))
        loss.backward()
        if losses is not None:
            losses.append(loss.item())
        return loss.detach()  # torch's own float(loss) warns otherwise

    return closure


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(kind: Any, steps: int = 4, **options: Any) -> tuple[Tensor, list[float], Any]:
    """Return the parameters, every loss that the closure returned, and the optimizer."""
    model = network(options.pop("dtype", torch.float64))
    optimizer = kind(model.parameters(), **options)
    losses: list[float] = []
    closure = closure_of(model, optimizer, losses)
    for _ in range(steps):
        optimizer.step(closure)
    return flat(model), losses, optimizer


# -- torch, bit for bit --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lr", [1, 0.3, torch.tensor(0.5), torch.tensor([0.5])], ids=str)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("history_size", [2, 100])
def test_two_loop_is_torchs(
    dtype: torch.dtype, lr: Any, line_search_fn: str | None, history_size: int
) -> None:
    """Catches one operation in another order or precision: equal is equal, at every evaluation."""
    options = {
        "lr": lr,
        "line_search_fn": line_search_fn,
        "history_size": history_size,
        "dtype": dtype,
        "max_iter": 15,
    }
    if isinstance(lr, torch.Tensor) and lr.dim() and torch.__version__ < "2.7":
        pytest.skip("torch's own takes no rate of one element before 2.7")
    ours, losses, optimizer = train(stableopt.LBFGS, direction="two_loop", **options)
    expected, torchs_losses, reference = train(torch.optim.LBFGS, **options)
    assert losses == torchs_losses
    assert len(losses) > 40
    assert torch.equal(ours, expected)
    (state,) = optimizer.state_dict()["state"].values()
    (torchs,) = reference.state_dict()["state"].values()
    assert state.keys() | {"al"} == torchs.keys()
    for name, value in state.items():
        left = value if isinstance(value, list) else [value]
        right = torchs[name] if isinstance(value, list) else [torchs[name]]
        assert len(left) == len(right), name
        for a, b in zip(left, right, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), name


@pytest.mark.parametrize(
    "options",
    [
        {"max_iter": 1},
        {"max_iter": 0},
        {"max_eval": 3},
        {"tolerance_grad": 0.02},
        {"tolerance_change": 1e-3},
        {"history_size": 1},
        {"max_iter": 30, "lr": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_two_loop_ends_steps_where_torch_does(
    options: dict[str, Any], line_search_fn: str | None
) -> None:
    """Catches a criterion that is checked at another moment, or not in every kind of step."""
    options = {**options, "line_search_fn": line_search_fn}
    ours, losses, _ = train(stableopt.LBFGS, direction="two_loop", **options)
    expected, torchs, _ = train(torch.optim.LBFGS, **options)
    assert losses == torchs
    assert torch.equal(ours, expected)


def stochastic(kind: Any, **options: Any) -> Tensor:
    """Take steps with another batch each, where torch forms pairs across batches."""
    model = network()
    optimizer = kind(model.parameters(), max_iter=3, **options)
    for step in range(12):
        rows = slice(5 * (step % 4), 5 * (step % 4) + 5)

        def closure(rows: slice = rows) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X[rows]), Y[rows])
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
    return flat(model)


def test_batches_that_change_are_torchs_too() -> None:
    """Catches pairs formed at the end of a step, where torch waits for the next gradient."""
    for options in ({}, {"line_search_fn": "strong_wolfe", "lr": 0.5}):
        with pytest.warns(RuntimeWarning, match="different losses at the same point"):
            ours = stochastic(stableopt.LBFGS, direction="two_loop", **options)
        assert torch.equal(ours, stochastic(torch.optim.LBFGS, **options))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_complex_sparse_missing_and_mixed_gradients_are_torchs(direction: str) -> None:
    """Catches a flattening that drops imaginary parts, or shifts everything after a missing one."""

    def run(kind: Any, **options: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        embedding = nn.Embedding(4, 3, sparse=True, dtype=torch.float64)
        with torch.no_grad():
            embedding.weight.copy_(torch.randn(4, 3, generator=generator, dtype=torch.float64))
        wave = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.complex128))
        unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        single = nn.Parameter(torch.ones(3, 2))
        params = [embedding.weight, unused, wave, single]
        optimizer = kind(params, line_search_fn="strong_wolfe", max_iter=8, **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            rows = embedding(torch.tensor([0, 2]))
            loss = (rows.sum(0) * wave - 1).abs().square().sum() + rows.square().sum()
            loss = loss + (single.double() @ torch.ones(2, dtype=torch.float64) - 3).square().sum()
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        return [torch.view_as_real(p) if p.is_complex() else p for p in map(Tensor.detach, params)]

    ours, expected = run(stableopt.LBFGS, direction=direction), run(torch.optim.LBFGS)
    for a, b in zip(ours, expected, strict=True):
        if direction == "two_loop":
            assert torch.equal(a, b)
        else:
            # Eight iterations on a dozen parameters of which some are single precision.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert float(ours[0].detach()[1].sum()) == pytest.approx(float(expected[0].detach()[1].sum()))


def test_gradients_in_another_order_of_memory() -> None:
    """Catches a ``view`` of the gradient, where torch's own raises: channels come last in images."""

    def run(memory_format: torch.memory_format) -> Tensor:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).double().to(memory_format=memory_format)
        images = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=memory_format)
        optimizer = stableopt.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=5)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(images).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return torch.cat([p.detach().contiguous().reshape(-1) for p in model.parameters()])

    # Convolutions sum in another order: five iterations from rounding.
    torch.testing.assert_close(
        run(torch.channels_last), run(torch.contiguous_format), rtol=1e-10, atol=1e-12
    )


# -- the ladder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("history_size", [3, 50])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_compact_is_two_loop_to_rounding(line_search_fn: str | None, history_size: int) -> None:
    """Catches a Gram matrix that goes stale as the ring turns: 14 iterations turn it four times."""
    options = {"line_search_fn": line_search_fn, "history_size": history_size, "max_iter": 14}
    compact, losses, optimizer = train(stableopt.LBFGS, steps=1, lr=0.5, **options)
    looped, expected, reference = train(
        stableopt.LBFGS, steps=1, lr=0.5, direction="two_loop", **options
    )
    assert len(losses) == len(expected)
    # Rounding of 2e-16 grows by less than 3 an iteration on this loss: by 1e4 in all.
    torch.testing.assert_close(compact, looped, rtol=1e-11, atol=1e-11)
    v = torch.randn(len(compact), 2, generator=torch.Generator().manual_seed(1)).double()
    found, wanted = optimizer.inverse_hessian_matvec(v), reference.inverse_hessian_matvec(v)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)  # the pairs differ by as much


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("history_size", [3, 50])
def test_inverse_hessian_is_the_textbooks(direction: str, history_size: int) -> None:
    """Catches a product that is not of the matrix that the pairs define, at any turn of the ring."""
    model = network()
    optimizer = stableopt.LBFGS(
        model.parameters(), max_iter=1, history_size=history_size, lr=0.5, direction=direction
    )
    closure = closure_of(model, optimizer)
    identity = torch.eye(len(flat(model)), dtype=torch.float64)
    assert torch.equal(optimizer.inverse_hessian_matvec(identity), identity)
    for step in range(12):
        optimizer.step(closure)
        (state,) = optimizer.state_dict()["state"].values()
        changes, steps = state["old_dirs"], state["old_stps"]
        assert len(changes) == min(step, history_size)
        matrix = optimizer.inverse_hessian_matvec(identity)
        if changes:
            dense = bfgs_inverse(torch.stack(changes), torch.stack(steps), float(state["H_diag"]))
            # Sums of 37 products, through triangles of a condition number below 1e3.
            torch.testing.assert_close(matrix, dense, rtol=1e-12, atol=1e-12)
        column = optimizer.inverse_hessian_matvec(identity[:, 3])
        torch.testing.assert_close(column, matrix[:, 3], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(
            matrix @ -state["prev_flat_grad"], state["d"], rtol=1e-11, atol=1e-12
        )


def test_vectors_that_do_not_fit() -> None:
    """Catches a product that broadcasts."""
    optimizer = stableopt.LBFGS(network().parameters())
    with pytest.raises(ValueError, match=r"expected \(37,\) or \(37, k\)"):
        optimizer.inverse_hessian_matvec(torch.ones(36))


# -- known minima --------------------------------------------------------------------------------


def minimise(
    function: Callable[[Tensor], Tensor], start: list[float], **options: Any
) -> tuple[Tensor, stableopt.LBFGS]:
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = stableopt.LBFGS(
        [x], max_iter=200, tolerance_grad=1e-10, tolerance_change=0, **options
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = function(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach(), optimizer


def rosenbrock(x: Tensor) -> Tensor:
    return ((1 - x[:-1]).square() + 100 * (x[1:] - x[:-1].square()).square()).sum()


def beale(x: Tensor) -> Tensor:
    a, b = x
    return (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("function", "start", "minimum"),
    [
        (rosenbrock, [-1.2, 1.0], [1.0, 1.0]),
        (rosenbrock, [-1.2, 1.0] * 5, [1.0] * 10),
        (beale, [1.0, 1.0], [3.0, 0.5]),
    ],
    ids=["rosenbrock", "rosenbrock_10", "beale"],
)
def test_known_minima(
    function: Callable[[Tensor], Tensor], start: list[float], minimum: list[float], direction: Any
) -> None:
    """Catches a line search that settles for less: curved valleys punish steps of one length."""
    x, _ = minimise(function, start, line_search_fn="strong_wolfe", direction=direction)
    # The gradient is below 1e-10 and the smallest curvature above 0.1: x is within 1e-9.
    torch.testing.assert_close(x, torch.tensor(minimum, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logistic_regression_has_scipys_minimum(direction: Any) -> None:
    """Catches a minimum of something else: weight decay of the optimizer is the penalty here."""
    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    x = torch.tensor(features, dtype=torch.float64)
    sign = torch.tensor(2.0 * labels - 1, dtype=torch.float64)
    penalty = 0.01

    def mean_loss(weight: Tensor) -> Tensor:
        return nn.functional.softplus(-sign * (x @ weight)).mean()

    weight, _ = minimise(
        mean_loss,
        [0.0] * 30,
        line_search_fn="strong_wolfe",
        weight_decay=penalty,
        direction=direction,
    )

    def value_and_gradient(point: Any) -> tuple[float, Any]:
        w = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        loss = mean_loss(w) + penalty / 2 * w.square().sum()
        (gradient,) = torch.autograd.grad(loss, w)
        return loss.item(), gradient.numpy()

    found = optimize.minimize(
        value_and_gradient,
        [0.0] * 30,
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 0, "gtol": 1e-10, "maxiter": 10_000},
    )
    # Strongly convex with 0.01: gradients of 1e-9 (where SciPy's search gives up) are within 1e-7.
    torch.testing.assert_close(weight, torch.tensor(found.x), rtol=0, atol=1e-6)


# -- groups and options --------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_equal_groups_are_one(direction: str, line_search_fn: str | None) -> None:
    """Catches groups that are searched one after the other: bit for bit one vector, none left out."""

    def run(split: bool) -> Tensor:
        model: Any = network()
        params: Any = list(model.parameters())
        if split:
            params = [{"params": params[:1]}, {"params": []}, {"params": params[1:]}]
        optimizer = stableopt.LBFGS(
            params, direction=direction, line_search_fn=line_search_fn, lr=0.5
        )
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer))
        return flat(model)

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_group_has_its_rate(direction: str) -> None:
    """Catches rates that are ignored or applied twice: two directions are known in closed form."""
    p, q = (nn.Parameter(torch.tensor([1.0], dtype=torch.float64)) for _ in range(2))
    optimizer = stableopt.LBFGS(
        [{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.4}],
        max_iter=1,
        direction=direction,
    )
    scale = torch.tensor([3.0, 5.0], dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (scale * torch.cat([p, q]).square()).sum() / 2
        loss.backward()
        return loss

    rates = torch.tensor([0.1, 0.4], dtype=torch.float64)
    before, gradient = torch.ones(2, dtype=torch.float64), scale
    optimizer.step(closure)
    first = torch.cat([p, q]).detach()
    # The first step has length lr / |g|_1 at most.
    torch.testing.assert_close(first, before - rates * gradient / 8)
    optimizer.step(closure)
    second = torch.cat([p, q]).detach()
    P = optimizer.inverse_hessian_matvec(torch.eye(2, dtype=torch.float64))
    root = torch.diag(rates.sqrt())
    torch.testing.assert_close(second, first - root @ P @ root @ (scale * first))


def test_rate_zero_freezes_a_group() -> None:
    """Catches pairs or quotients that are NaN where a step is zero; and a search along nothing."""
    model: Any = network()
    optimizer = stableopt.LBFGS(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}],
        line_search_fn="strong_wolfe",
    )
    frozen = model[0].weight.detach().clone()
    closure = closure_of(model, optimizer)
    before = float(closure())
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, frozen)
    assert float(closure()) < before
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    resting = flat(model)
    optimizer.step(closure)
    assert torch.equal(flat(model), resting)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_weight_decay_and_maximize_are_those_of_the_loss(
    direction: str, line_search_fn: str | None
) -> None:
    """Catches decay in the gradient only, which a line search cannot descend, and signs."""

    def run(inside: bool) -> Tensor:
        model = network()
        own = {} if inside else {"weight_decay": 0.1, "maximize": True}
        optimizer = stableopt.LBFGS(
            model.parameters(),
            line_search_fn=line_search_fn,
            direction=direction,
            max_iter=6,
            lr=0.5,
            **own,
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X), Y)
            decay = 0.05 * sum(p.square().sum() for p in model.parameters())
            loss = loss + decay if inside else -loss
            loss.backward()
            return loss

        optimizer.step(closure)
        return flat(model)

    # Six iterations from gradients that differ by rounding.
    torch.testing.assert_close(run(True), run(False), rtol=1e-11, atol=1e-11)


def test_decay_of_one_group() -> None:
    """Catches a decay taken from the first group for all."""
    p, q = (nn.Parameter(torch.tensor([2.0], dtype=torch.float64)) for _ in range(2))
    optimizer = stableopt.LBFGS(
        [{"params": [p], "weight_decay": 3.0}, {"params": [q]}],
        line_search_fn="strong_wolfe",
        max_iter=50,
        tolerance_change=0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((p - 1).square() + (q - 1).square()).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    # (p - 1) + 3 p = 0; gradients end below 1e-7.
    assert (p.item(), q.item()) == (pytest.approx(0.25, abs=1e-6), pytest.approx(1, abs=1e-6))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": torch.ones(2)}, "2 elements"),
        ({"max_iter": 1.5}, "max_iter=1.5"),
        ({"max_eval": -1}, "max_eval=-1"),
        ({"history_size": 0}, "history_size=0"),
        ({"line_search_fn": "armijo"}, "line_search_fn='armijo'"),
        ({"direction": "dense"}, "direction='dense'"),
        ({"damping": 1.0}, r"damping=1\.0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"tolerance_grad": float("nan")}, "tolerance_grad=nan"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    """Catches values that torch takes and fails on in the middle of the training."""
    with pytest.raises(ValueError, match=says):
        stableopt.LBFGS([nn.Parameter(torch.ones(1))], **options)


def test_groups_differ_in_rates_and_decays_only() -> None:
    """Catches an option of a second group that is silently the first one's."""
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="history_size 100 and 5"):
        stableopt.LBFGS([{"params": [p]}, {"params": [q], "history_size": 5}])
    optimizer = stableopt.LBFGS([p])
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [q], "lr": -1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q], "lr": 0.1})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_group_added_later(direction: str) -> None:
    """Catches pairs of the old length in products with gradients of the new one."""
    model: Any = network()
    optimizer = stableopt.LBFGS(
        model[0].parameters(), direction=direction, line_search_fn="strong_wolfe", max_iter=5
    )
    losses: list[float] = []
    closure = closure_of(model, optimizer, losses)
    optimizer.step(closure)
    frozen = float(closure())
    optimizer.add_param_group({"params": model[2].parameters()})
    for _ in range(5):
        optimizer.step(closure)
    assert losses[-1] < frozen / 2
    assert optimizer.inverse_hessian_matvec(torch.ones(37, dtype=torch.float64)).shape == (37,)


# -- pairs ---------------------------------------------------------------------------------------


def test_pairs_do_not_depend_on_the_scale_of_the_loss() -> None:
    """Catches an absolute threshold: at a scale of 1e-12 torch keeps no pair."""
    kept = {}
    for scale in (1.0, 2.0**-40):
        for kind in (stableopt.LBFGS, torch.optim.LBFGS):
            x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
            optimizer = kind([x], max_iter=5, tolerance_grad=0, tolerance_change=0)

            def closure(x: Tensor = x, scale: float = scale, o: Any = optimizer) -> Tensor:
                o.zero_grad()
                loss = scale * (x[0] ** 2 + 10 * x[1] ** 2 + x[0] * x[1])
                loss.backward()
                return loss.detach()

            for _ in range(2):
                optimizer.step(closure)
            (state,) = optimizer.state_dict()["state"].values()
            kept[kind, scale] = len(state["old_dirs"])
    assert kept[torch.optim.LBFGS, 1.0] > 3
    assert kept[torch.optim.LBFGS, 2.0**-40] == 0
    assert kept[stableopt.LBFGS, 1.0] > 3
    assert kept[stableopt.LBFGS, 2.0**-40] > 3


@pytest.mark.parametrize("kind", [CompactPairs, TwoLoopPairs])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_damping_bends_pairs_of_negative_curvature(kind: Any, damping: float) -> None:
    """Catches pairs that are dropped under damping, or kept without; and too little curvature."""
    memory = kind(5, {})
    zero = torch.zeros(3, dtype=torch.float64)

    def move(y: list[float], direction: list[float], t: float) -> None:
        pair = (torch.tensor(y).double(), zero, torch.tensor(direction).double())
        memory.update(*pair, t, memory.numbers(*memory.products(*pair)), damping)

    # Nothing is known of the scale yet: even a damped memory can only drop it.
    move([-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], 1.0)
    assert memory.export()["old_dirs"] == []
    move([4.0, 0.0, 0.0], [1.0, 0.0, 0.0], 2.0)
    assert float(memory.export()["H_diag"]) == 0.5
    # s = (0, 1, 2): sigma = 5 / 0.5 = 10, and y s = -4 < 0.2 sigma = 2.
    move([7.0, 4.0, -4.0], [0.0, 0.5, 1.0], 2.0)
    state = memory.export()
    if not damping:
        assert len(state["old_dirs"]) == 1
        return
    theta = 0.8 * 10 / (10 + 4)
    expected = theta * torch.tensor([7.0, 4.0, -4.0]) + (1 - theta) * torch.tensor([0.0, 2.0, 4.0])
    torch.testing.assert_close(state["old_dirs"][-1], expected.double())
    assert float(1 / state["ro"][-1]) == pytest.approx(2.0)
    assert float(state["H_diag"]) == pytest.approx(2 / float(expected.square().sum()), rel=1e-6)
    # Enough curvature is left alone.
    move([0.0, 0.0, 3.0], [0.0, 0.0, 1.0], 1.0)
    assert memory.export()["old_dirs"][-1].tolist() == [0.0, 0.0, 3.0]


# -- copies and checkpoints ----------------------------------------------------------------------


def through_file(state: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("history_size", [3, 100])
def test_resumed_run_is_the_same_run(
    direction: str, line_search_fn: str | None, history_size: int
) -> None:
    """Catches state beside the state dict, and a checkpoint that further training writes into."""
    options = {
        "direction": direction,
        "line_search_fn": line_search_fn,
        "history_size": history_size,
        "max_iter": 7,
        "lr": 0.5,
    }
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), **options)
    closure = closure_of(model, optimizer)
    for _ in range(2):
        optimizer.step(closure)
    kept = optimizer.state_dict(), copy.deepcopy(model)
    saved = through_file(kept[0], weights_only=True)
    for _ in range(3):
        optimizer.step(closure)
    for state in (saved, kept[0]):
        twin = copy.deepcopy(kept[1])
        resumed = stableopt.LBFGS(twin.parameters())
        resumed.load_state_dict(state)
        for _ in range(3):
            resumed.step(closure_of(twin, resumed))
        assert torch.equal(flat(twin), flat(model))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_copies_go_on(way: str, direction: str) -> None:
    """Catches what torch's own LBFGS loses: ``_params``, and with it every copy."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), direction=direction, max_iter=6, lr=0.5)
    optimizer.step(closure_of(model, optimizer))
    pair = (model, optimizer)
    if way == "deepcopy":
        twin, copied = copy.deepcopy(pair)
    elif way == "pickle":
        twin, copied = pickle.loads(pickle.dumps(pair))
    else:
        twin, copied = through_file(pair, weights_only=False)
    assert type(copied) is stableopt.LBFGS
    for m, o in (pair, (twin, copied)):
        for _ in range(2):
            o.step(closure_of(m, o))
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_checkpoints_interchange_with_torch(direction: str, line_search_fn: str | None) -> None:
    """Catches a key that one side lacks, and Gram matrices of pairs that torch has replaced."""
    options = {"line_search_fn": line_search_fn, "max_iter": 4, "lr": 0.5, "history_size": 5}

    def run(kinds: list[Any]) -> Tensor:
        model, state = network(), None
        for kind in kinds:
            own = {"direction": direction} if kind is stableopt.LBFGS else {}
            optimizer = kind(model.parameters(), **options, **own)
            if state is not None:
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict(state)
                if own:
                    assert optimizer.param_groups[0]["weight_decay"] == 0
                    optimizer.param_groups[0]["direction"] = direction
                assert groups[0].keys() <= optimizer.param_groups[0].keys()
            optimizer.step(closure_of(model, optimizer))
            state = through_file(optimizer.state_dict(), weights_only=True)
        return flat(model)

    expected = run([torch.optim.LBFGS] * 6)
    for kinds in (
        [torch.optim.LBFGS, torch.optim.LBFGS, stableopt.LBFGS, stableopt.LBFGS] * 2,
        [stableopt.LBFGS, torch.optim.LBFGS] * 3,
    ):
        found = run(kinds[:6])
        if direction == "two_loop":
            assert torch.equal(found, expected)
        else:
            # Twenty-four iterations; see test_compact_is_two_loop_to_rounding.
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_options_may_change_under_way() -> None:
    """Catches a memory that is lost, or of the wrong kind, after its options are set anew."""
    options = {"max_iter": 6, "lr": 0.5}
    expected, _, _ = train(stableopt.LBFGS, steps=2, direction="two_loop", **options)
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), **options)
    closure = closure_of(model, optimizer)
    optimizer.step(closure)
    optimizer.param_groups[0]["direction"] = "two_loop"
    optimizer.param_groups[0]["history_size"] = 50
    optimizer.step(closure)
    torch.testing.assert_close(flat(model), expected, rtol=1e-11, atol=1e-11)  # as above
    optimizer.param_groups[0]["history_size"] = 3
    optimizer.step(closure)
    (state,) = optimizer.state_dict()["state"].values()
    assert len(state["old_dirs"]) == 3
