"""``stableopt.LBFGS`` and what goes wrong around it: losses that are not finite, noise, misuse."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stableopt
from stableopt.stability import UpdateRule

DIRECTIONS = ["compact", "two_loop"]
SEARCHES: list[str | None] = [None, "strong_wolfe"]

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, generator=GENERATOR)
Y = torch.randn(12, 2, generator=GENERATOR)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def closure_of(model: nn.Module, optimizer: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X), Y)
        loss.backward()
        return loss

    return closure


def repeat(times: int, action: Callable[[], Any]) -> list[Any]:
    return [action() for _ in range(times)]


@pytest.fixture
def unheard() -> Iterator[None]:
    """Let warnings pass: what they say is another test's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- losses and gradients that are not finite ----------------------------------------------------

BAD: dict[str, tuple[float | None, float]] = {
    "nan_loss": (math.nan, 1.0),
    "minus_inf_loss": (-math.inf, 1.0),
    "nan_gradient": (None, math.nan),
    "huge_gradient": (None, 3e37),
}
"""The loss in place of the true one, and a factor of one entry of the gradient."""


class Valley:
    """A narrow valley whose calls, from one on or that one alone, go wrong."""

    def __init__(self, strikes: Callable[[int], bool], bad: str) -> None:
        self.x = nn.Parameter(torch.tensor([3.0, -2.0]))
        self.strikes, self.bad, self.calls = strikes, BAD[bad], 0

    def value(self) -> float:
        return float(self.x[0].detach() ** 2 + 10 * self.x[1].detach() ** 2)

    def closure(self) -> Tensor:
        self.calls += 1
        x = self.x.detach()
        assert bool(torch.isfinite(x).all()), self.calls
        self.x.grad = torch.stack([2 * x[0], 20 * x[1]])
        if not self.strikes(self.calls):
            return torch.tensor(self.value())
        self.x.grad[1] *= self.bad[1]
        return torch.tensor(self.value() if self.bad[0] is None else self.bad[0])


@pytest.mark.usefixtures("unheard")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("max_iter", [1, 5])
def test_parameters_stay_finite_whenever_it_strikes(
    bad: str, direction: str, line_search_fn: str | None, max_iter: int
) -> None:
    """Catches any path to non-finite parameters, from every call on; and an optimizer left stuck."""
    for first, lasting in itertools.product(range(1, 8), (False, True)):
        strikes = (lambda n, first=first: n >= first) if lasting else first.__eq__
        valley = Valley(strikes, bad)
        optimizer = stableopt.LBFGS(
            [valley.x],
            lr=0.5,
            max_iter=max_iter,
            direction=direction,
            line_search_fn=line_search_fn,
        )
        for _ in range(3 if lasting else 25 // max_iter):
            optimizer.step(valley.closure)
            assert bool(torch.isfinite(valley.x).all()), (first, lasting)
        # From 49: what has passed is overcome, and what lasts ruins nothing that was reached.
        assert valley.value() < (60 if lasting else 1), (first, lasting)


@pytest.mark.usefixtures("unheard")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("start", [1e-3, 30.0])
def test_steps_over_the_edge_come_back(
    direction: str, line_search_fn: str | None, start: float
) -> None:
    """Catches a search that stretches, or gives up, beyond the wall of a logarithmic barrier."""
    x = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = stableopt.LBFGS(
        [x], lr=1, max_iter=100, direction=direction, line_search_fn=line_search_fn
    )
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x - 5 * x.log()).sum()  # NaN for x < 0; the minimum is at 5
        loss.backward()
        seen.append(math.isfinite(loss.item()))
        return loss

    for _ in range(5):
        optimizer.step(closure)
    # Steps end where the loss changes by less than 1e-9: within sqrt(2e-9 * 5) of the minimum.
    assert x.item() == pytest.approx(5, abs=2e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_search_across_the_edge(direction: str) -> None:
    """Catches a first trial that is not finite taken for a low one: it must be the high end."""
    x = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimizer = stableopt.LBFGS(
        [x], lr=1e6, max_iter=1, max_eval=20, direction=direction, line_search_fn="strong_wolfe"
    )
    values = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x.square() + (100 - x).sqrt() * 0).sum() - 2 * x.sum()
        loss.backward()
        values.append((x.item(), math.isfinite(loss.item())))
        return loss

    optimizer.step(closure)
    assert not values[1][1]
    assert 0.5 < x.item() < 1.5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_straight_line_is_followed_not_lost(direction: str) -> None:
    """Catches the cubic through a line, divided by zero: floats raise where tensors know infinity."""
    x = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = stableopt.LBFGS(
        [x], line_search_fn="strong_wolfe", max_iter=2, direction="two_loop"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -x.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert bool((x > 1).all())
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("max_iter", [1, 3])
def test_saturated_loss_does_not_hide_an_overflow(max_iter: int) -> None:
    """Catches parameters that grow tenfold a trial while the loss, in half precision, looks fine."""
    x = nn.Parameter(torch.full((2,), 2.0, dtype=torch.float16))
    optimizer = stableopt.LBFGS(
        [x], lr=1e3, max_iter=max_iter, line_search_fn=None, tolerance_grad=0, tolerance_change=0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        x.grad = torch.full_like(x, -8.0)
        return torch.tensor(1.0)

    with pytest.warns(RuntimeWarning, match="not finite"):
        repeat(12, lambda: optimizer.step(closure))
    assert bool(torch.isfinite(x).all())
    assert bool((x > 10_000).all())  # and it went as far as it could


def test_first_loss_that_is_not_finite_is_told_once() -> None:
    """Catches silence, a warning at every step, and a step taken on a gradient of nothing."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters())
    before = flat(model)
    with pytest.warns(RuntimeWarning, match=r"not finite.*strong_wolfe") as caught:
        losses = repeat(3, lambda: optimizer.step(lambda: torch.tensor(math.nan)))
    assert all(map(math.isnan, losses))
    assert len(caught) == 1
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_closure_that_raises(direction: str, line_search_fn: str | None) -> None:
    """Catches parameters left at a trial point, and a pair remembered twice when training goes on."""
    model = network()
    optimizer = stableopt.LBFGS(
        model.parameters(), direction=direction, line_search_fn=line_search_fn, lr=0.5
    )
    plain, calls = closure_of(model, optimizer), 0
    optimizer.step(plain)
    before = flat(model)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return plain()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)
    kept = len(next(iter(optimizer.state_dict()["state"].values()))["old_dirs"])
    calls = 2
    loss = optimizer.step(closure)
    after = plain()
    assert after < loss
    assert kept < len(next(iter(optimizer.state_dict()["state"].values()))["old_dirs"])


# -- noise ---------------------------------------------------------------------------------------


def test_noise_is_told_once_and_only_of_the_same_point() -> None:
    """Catches a warning where parameters were changed by hand, and one that costs extra calls."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=3)
    plain, noise, calls = closure_of(model, optimizer), 0.0, 0

    def closure() -> Tensor:
        nonlocal calls, noise
        calls += 1
        noise *= 1.01
        return plain() + noise

    for _ in range(3):
        optimizer.step(closure)  # warnings are errors here
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
    optimizer.step(closure)
    noise = 0.01
    with pytest.warns(RuntimeWarning, match=r"different losses.*strong_wolfe") as caught:
        repeat(4, lambda: optimizer.step(closure))
    assert len(caught) == 1
    assert calls == next(iter(optimizer.state.values()))["func_evals"]


def test_end_that_nobody_evaluated_is_not_judged() -> None:
    """Catches a comparison with the loss of another point: a fixed step of one iteration."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), max_iter=1, lr=0.1)
    for index in range(6):
        rows = slice(2 * index, 2 * index + 2)

        def closure(rows: slice = rows) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X[rows]), Y[rows])
            loss.backward()
            return loss

        optimizer.step(closure)


# -- misuse --------------------------------------------------------------------------------------


def test_without_a_closure() -> None:
    """Catches torch's message, which names an argument and not what to do."""
    optimizer = stableopt.LBFGS(network().parameters())
    for step in (optimizer.step, lambda: optimizer.step(None), lambda: optimizer.step(3.0)):
        with pytest.raises(TypeError, match=r"closure=.*calls it several times"):
            step()


@pytest.mark.parametrize(
    ("returned", "error", "says"),
    [
        (None, TypeError, "returned None"),
        (torch.ones(3), ValueError, r"shape \(3,\)"),
    ],
    ids=["none", "vector"],
)
def test_closures_that_return_no_loss(returned: Any, error: type[Exception], says: str) -> None:
    """Catches a failure far from its cause."""
    optimizer = stableopt.LBFGS(network().parameters())
    with pytest.raises(error, match=says):
        optimizer.step(lambda: returned)


@pytest.mark.parametrize("kind", [float, lambda x: torch.tensor([x]), lambda x: torch.tensor(x)])
def test_losses_of_other_types(kind: Callable[[float], Any]) -> None:
    """Catches a loss that must be a 0-dimensional tensor; torch takes numbers as well."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    plain = closure_of(model, optimizer)
    first = optimizer.step(lambda: kind(plain().item()))
    assert plain().item() < float(first)


@pytest.mark.parametrize("unscaled", [False, True])
def test_gradient_scaler(unscaled: bool) -> None:
    """Catches scaled gradients in pairs, and a message about inf checks in place of the reason."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plain = closure_of(model, optimizer)
    scaler.scale(nn.functional.mse_loss(model(X), Y)).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    before = flat(model)
    with pytest.raises(RuntimeError, match=r"GradScaler.*bfloat16"):
        scaler.step(optimizer, plain)
    assert torch.equal(flat(model), before)
    optimizer.step(plain)  # without it, all is well again
    switched_off = torch.amp.GradScaler("cpu", enabled=False)
    switched_off.step(optimizer, plain)
    assert plain() < 2


def test_nothing_to_train() -> None:
    """Catches an index error where every group is empty, which SGD takes for no work."""
    optimizer = stableopt.LBFGS([{"params": []}])
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert optimizer.inverse_hessian_matvec(torch.ones(0)).shape == (0,)
    optimizer = stableopt.LBFGS([nn.Parameter(torch.ones(0))])
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0


# -- what works beside it ------------------------------------------------------------------------


def test_ranks_take_the_same_branches() -> None:
    """Catches a branch that is taken on the rank's own loss: calls would differ, and hang."""

    def run(own: float) -> tuple[int, Tensor]:
        model = network()
        optimizer = stableopt.LBFGS(
            model.parameters(),
            line_search_fn="strong_wolfe",
            # As a mean over ranks would: all see the same number, whatever is theirs alone.
            reduce_loss=lambda loss: loss - own * len(seen),
        )
        plain, seen = closure_of(model, optimizer), []

        def closure() -> Tensor:
            seen.append(own)
            return plain() + own * len(seen)

        returned = optimizer.step(closure)
        assert returned.item() == pytest.approx(0.653 + own, abs=1e-3)
        return len(seen), flat(model)

    (calls, point), (other_calls, other_point) = run(0.0), run(0.5)
    assert calls == other_calls
    # A half a call is added and taken away in single precision.
    torch.testing.assert_close(point, other_point, rtol=1e-2, atol=1e-2)


HOOKS = """
import itertools, os, sys
import torch
import torch._dynamo
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
import stableopt

def check(order):
    calls = []
    register_optimizer_step_pre_hook(lambda o, a, k: calls.append("global pre"))
    register_optimizer_step_post_hook(lambda o, a, k: calls.append("global post"))
    for kind in order:
        p = nn.Parameter(torch.ones(1))
        optimizer = kind([p])
        optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre"))
        optimizer.register_step_post_hook(lambda o, a, k: calls.append("post"))
        def closure():
            p.grad = 2 * p.detach()
            return p.detach().square().sum()
        calls.clear()
        optimizer.step(closure)
        assert calls == ["global pre", "pre", "post", "global post"], (order, calls)
        assert abs(p.item()) < 1e-3, p

for order in itertools.permutations([torch.optim.LBFGS, stableopt.LBFGS, stableopt.LBFGS]):
    child = os.fork()
    if child == 0:
        try:
            check(order)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, order
print("all orders")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")
def test_step_hooks_fire_once_whichever_class_comes_first() -> None:
    """Catches ``step`` wrapped once for the class and once for its base."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all orders"


def test_compiled_step() -> None:
    """Catches a step that the compiler traces into: its control flow depends on data."""
    model, other = network(), network()
    optimizer, reference = (stableopt.LBFGS(m.parameters(), lr=0.5) for m in (model, other))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        step(lambda: closure_of(model, optimizer)().detach())
        reference.step(closure_of(other, reference))
    torch._dynamo.reset()
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_model_cast_under_way(direction: str) -> None:
    """Catches pairs of the old dtype in products with gradients of the new one."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), lr=0.5, max_iter=3, direction=direction)
    optimizer.step(closure_of(model, optimizer))
    model.double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X.double()), Y.double())
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(3):
        optimizer.step(closure)
    assert closure() < first
    assert optimizer.inverse_hessian_matvec(torch.ones(20).double()).dtype == torch.float64


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(direction: str, dtype: torch.dtype) -> None:
    """Catches kernels that half precision lacks, as triangular systems do."""
    model = network().to(dtype)
    optimizer = stableopt.LBFGS(
        model.parameters(), max_iter=5, direction=direction, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X.to(dtype)), Y.to(dtype))
        loss.backward()
        return loss

    first = optimizer.step(closure)
    optimizer.step(closure)
    assert closure() < first


def test_scheduler_sets_the_rate() -> None:
    """Catches a rate that is read once: at rate zero nothing moves."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), lr=1.0, max_iter=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 0)
    closure, points = closure_of(model, optimizer), []
    for _ in range(4):
        optimizer.step(closure)
        scheduler.step()
        points.append(flat(model))
    assert not torch.equal(points[0], points[1])
    assert torch.equal(points[2], points[3])


def full_batch(optimizer: Any) -> UpdateRule:
    return UpdateRule(lr=float(optimizer.param_groups[0]["lr"]), full_batch=True)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_tracking_leaves_training_alone_and_counts_steps(line_search_fn: str | None) -> None:
    """Catches a measurement within a step, or samples of all its calls taken for the batch."""
    ends = []
    for tracked in (False, True):
        model = network()
        optimizer = stableopt.LBFGS(
            model.parameters(), lr=0.5, max_iter=5, line_search_fn=line_search_fn
        )
        if tracked:
            optimizer.track(model, nn.MSELoss(), (X, Y), every=1, update_rule=full_batch)
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer))
        ends.append(flat(model))
    assert torch.equal(*ends)
    history = list(optimizer.monitor.history)
    assert [m.step for m in history] == [1, 2, 3]
    assert [m.failure for m in history] == [None] * 3
    # Every call of the closure sees all 12 samples; a step has 12, however often it looks.
    assert [m.batch_size for m in history] == [12] * 3
    assert [m.dataset_size for m in history] == [12] * 3
