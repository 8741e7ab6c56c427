"""The monitor: what it measures and when, and that training with it is training without it."""

from __future__ import annotations

import io
import math
import random
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stableopt
import stableopt.monitor.monitor
from stableopt import StabilityMonitor, UpdateRule

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 2, generator=GENERATOR)
Y = X.sum(1, keepdim=True).sin()
MSE = nn.MSELoss()


def linear() -> nn.Linear:
    """Return a model of two parameters: two products find its sharpness, up to rounding."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    return model


def start(lr: float = 0.1, **options: Any) -> tuple[nn.Linear, stableopt.SGD, StabilityMonitor]:
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=lr)
    return model, optimizer, optimizer.track(model, MSE, (X, Y), **{"every": 1, **options})


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, rows: Any = slice(0, 4)
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        MSE(model(X[rows]), Y[rows]).backward()
        optimizer.step()


def hooks_left(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    return (
        len(optimizer._optimizer_step_post_hooks)
        + len(optimizer._optimizer_step_pre_hooks)
        + sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    )


# -- without a trace ---------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws from every generator, in training and in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + float(np.random.rand())  # noqa: NPY002
        return x * (1 + 0.1 * torch.rand_like(x)) + 0.01 * noise


def restless() -> nn.Sequential:
    torch.manual_seed(1)
    frozen = nn.BatchNorm1d(4).eval()
    return nn.Sequential(
        nn.Linear(2, 4),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        Noisy(),
        frozen,
        nn.Dropout(0.3),
        nn.Linear(4, 1),
    )


def snapshot(model: nn.Module, generator: torch.Generator) -> list[Any]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return [
        *(None if t is None else t.detach().clone() for t in tensors),
        torch.get_rng_state(),
        generator.get_state(),
        torch.from_numpy(numpy[1].astype(np.int64)),
        (python, numpy[0], numpy[2:]),
        [module.training for module in model.modules()],
    ]


def equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )


def restless_run(
    watch: Callable[[torch.optim.Optimizer, nn.Module, Any], StabilityMonitor] | None,
    around: Callable[[], Any] = torch.no_grad,
) -> tuple[list[list[Any]], StabilityMonitor | None]:
    """Return snapshots after each step of two epochs over a loader that also is the probe."""
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    model, generator = restless(), torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=generator)
    optimizer = stableopt.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = None
    if watch is not None:
        with pytest.warns(UserWarning, match="batch norm"):
            monitor = watch(optimizer, model, loader)
    shots = [snapshot(model, generator)]
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            MSE(model(x), y).backward()
            gradients = [p.grad for p in model.parameters()]
            before = [g.clone() for g in gradients if g is not None]
            with around():
                optimizer.step()
            # `is`: user code may hold on to a gradient, and so must the model.
            assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
            assert equal(before, [p.grad for p in model.parameters()])
            shots.append(snapshot(model, generator))
    return shots, monitor


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["no_grad", "enable_grad", "inference_mode", "autocast"],
)
def test_monitor_leaves_no_trace(around: Callable[[], Any]) -> None:
    """Catches anything a measurement moves: weights, gradients, statistics, modes, random numbers.

    Dropout, batch norm and the loader make later steps depend on whatever was moved before.
    """

    def watch(optimizer: torch.optim.Optimizer, model: nn.Module, loader: Any) -> Any:
        quantities = ("sharpness", "non_uniformity")
        return StabilityMonitor(optimizer, model, MSE, loader, every=1, quantities=quantities)

    bare, _ = restless_run(None, around)
    watched, monitor = restless_run(watch, around)
    assert monitor is not None
    # As many measurements as steps, or there was nothing to leave a trace; two modes of 17.
    assert [(m.step, m.failure) for m in monitor.history] == [(k, None) for k in range(1, 7)]
    for index, (left, right) in enumerate(zip(bare, watched, strict=True)):
        assert equal(left, right), f"after step {index}"


def test_failing_measurement_leaves_no_trace() -> None:
    """Catches restoring that is skipped when the loss raises halfway through a measurement."""

    def watch(optimizer: torch.optim.Optimizer, model: nn.Module, loader: Any) -> Any:
        armed = calls = 0

        def loss(output: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += armed
            if calls > 1:  # after the first batch of the first measurement
                raise RuntimeError("out of luck")
            return MSE(output, y)

        monitor = StabilityMonitor(optimizer, model, loss, loader, every=1)
        armed = 1
        return monitor

    bare, _ = restless_run(None)
    with pytest.warns(RuntimeWarning, match="out of luck") as caught:
        watched, monitor = restless_run(watch)
    assert len([w for w in caught if "out of luck" in str(w.message)]) == 1
    assert monitor is not None
    assert [m.failure for m in monitor.history] == ["RuntimeError: out of luck"] * 6
    assert all(equal(left, right) for left, right in zip(bare, watched, strict=True))


def test_autocast_does_not_reach_the_measurement() -> None:
    """Catches curvature in bfloat16 because the step happened to stand in an autocast block."""
    values = []
    for enabled in (False, True):
        model, optimizer, monitor = start()
        MSE(model(X), Y).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        assert monitor.margins is not None
        values.append((monitor.margins.sharpness, monitor.margins.loss))
    assert values[0] == values[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_the_training_loader_are_not_disturbed() -> None:
    """Catches a probe that iterates the very loader which training iterates, and so restarts it."""

    def run(watched: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(4)
        loader = DataLoader(
            TensorDataset(X, Y),
            batch_size=5,
            shuffle=True,
            generator=generator,
            num_workers=1,
            persistent_workers=True,
        )
        model = linear()
        optimizer = stableopt.SGD(model.parameters(), lr=0.1)
        monitor = optimizer.track(model, MSE, loader, every=1) if watched else None
        seen = []
        for _ in range(2):
            for x, y in loader:
                seen.append(x)
                optimizer.zero_grad()
                MSE(model(x), y).backward()
                optimizer.step()
        measured = 0 if monitor is None else len([m for m in monitor.history if m.converged])
        return [*seen, model.weight.detach(), generator.get_state()], measured

    bare, watched = run(False), run(True)
    assert watched[1] == 6
    assert equal(bare[0], watched[0])


def test_parameter_hooks_do_not_fire() -> None:
    """Catches second-order passes through the user's own parameters instead of copies."""
    model, optimizer, monitor = start()
    calls: list[str] = []
    model.weight.register_hook(lambda gradient: calls.append("gradient"))
    model.weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    monitor.measure()
    assert calls == []
    train(model, optimizer)
    assert calls == ["gradient", "accumulated"]  # those of training


def test_batch_norm_is_warned_of_once() -> None:
    """Catches a warning at every measurement, and none at all."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    optimizer = stableopt.SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="batch norm in training mode") as caught:
        monitored(model, optimizer, steps=3)
    assert len(caught) == 1


# -- when it measures ----------------------------------------------------------------------------


def monitored(model: nn.Module, optimizer: stableopt.SGD, steps: int) -> None:
    optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer, steps)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_k_steps(every: int) -> None:
    """Catches counting from zero, which measures at steps 1, k + 1, ... and once too often."""
    model, optimizer, monitor = start(every=every)
    train(model, optimizer, 8)
    assert [m.step for m in monitor.history] == list(range(every, 9, every))
    assert monitor.step == 8


def test_steps_at_rate_zero_are_not_measured() -> None:
    """Catches infinite limits in a warm-up's first step, and a due measurement that is forgotten."""
    model, optimizer, monitor = start(every=2)
    for lr in (0.1, 0.0, 0.0, 0.1, 0.1, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        train(model, optimizer)
    # Due at 2, 4 and 6; step 2 moved nothing, nor did 3, so that one is made up for at 4.
    assert [m.step for m in monitor.history] == [4, 6]


def test_one_group_at_rate_zero_is_measured() -> None:
    """Catches a frozen group taken for a step that moved nothing."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups: list[dict[str, Any]] = [{"params": m.parameters()} for m in model]
    groups[0]["lr"] = 0.0
    optimizer = stableopt.SGD(groups, lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer, 2)
    assert [(m.step, m.lr, m.failure) for m in monitor.history] == [(1, 0.1, None), (2, 0.1, None)]


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.125, 0.5, 2.0])
def test_share_of_the_training_time_is_held(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Catches a share of wall time instead of training time, and measuring far less than allowed.

    Times are multiples of 1/4, so that all sums are exact.
    """
    clock = Clock()
    monkeypatch.setattr(
        stableopt.monitor.monitor, "time", types.SimpleNamespace(perf_counter=clock)
    )

    def slow(output: Tensor, y: Tensor) -> Tensor:
        clock.now += 0.25
        return MSE(output, y)

    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, slow, (X, Y), max_overhead=share)
    due, waited, cost, spent = [], 0.0, 0.0, 0.0
    began = clock.now
    for step in range(1, 41):
        optimizer.zero_grad()
        MSE(model(X), Y).backward()
        clock.now += 0.5
        waited += 0.5
        before = clock.now
        optimizer.step()
        took = clock.now - before
        # A plain account of the same: a measurement may come when the last has been paid for.
        if waited >= cost / share:
            due.append(step)
            assert took > 0
            spent, cost, waited = spent + took, took, 0.0
        else:
            assert took == 0
    assert [m.step for m in monitor.history] == due
    assert len(due) >= 3
    # Up to the last, which is paid for afterwards.
    training = 40 * 0.5
    assert spent - cost <= share * training
    assert clock.now - began == training + spent
    assert monitor.overhead == spent / training


def test_default_share_is_five_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a default that measures every step: 1 s of measuring asks for 20 s of training."""
    clock = Clock()
    monkeypatch.setattr(
        stableopt.monitor.monitor, "time", types.SimpleNamespace(perf_counter=clock)
    )

    def slow(output: Tensor, y: Tensor) -> Tensor:
        # Once a measurement: all its products share the passes. A trial on a few samples is nothing.
        clock.now += 1.0 if len(y) == len(Y) else 0.0
        return MSE(output, y)

    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, slow, (X, Y))
    for _ in range(45):
        clock.now += 1.0
        train(model, optimizer)
    assert [m.step for m in monitor.history] == [1, 21, 41]


# -- batch and data set sizes --------------------------------------------------------------------


def limit(lr: float, batch: int, n: float) -> Any:
    """Equation (9): sqrt(B (n-1) / (n-B)) / lr, to the few roundings of either order."""
    factor = 1.0 if n == math.inf else (n - 1) / (n - batch)
    return pytest.approx(math.sqrt(batch * factor) / lr, rel=1e-14)


def test_batch_size_is_observed() -> None:
    """Catches limits for another batch size than the one that trains."""
    model, optimizer, monitor = start()
    assert monitor.batch_size is None
    train(model, optimizer, rows=slice(0, 3))
    assert monitor.batch_size == 3
    assert monitor.margins is not None
    assert (monitor.margins.batch_size, monitor.margins.dataset_size) == (3, 12)
    assert monitor.margins.non_uniformity_limit == limit(0.1, 3, 12)


def test_gradient_accumulation_counts_as_one_batch() -> None:
    """Catches the size of a micro-batch taken for that of the step."""
    model, optimizer, monitor = start()
    for _ in range(2):
        optimizer.zero_grad()
        for rows in (slice(0, 4), slice(4, 7)):
            MSE(model(X[rows]), Y[rows]).backward()
        optimizer.step()
    assert monitor.batch_size == 7


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation_between_steps_is_not_counted(mode: Callable[[], Any]) -> None:
    """Catches samples of a validation pass added to the next step's."""
    model, optimizer, monitor = start()
    for _ in range(3):
        train(model, optimizer)
        with mode():
            model(X)
    assert monitor.batch_size == 4


def test_other_measurements_are_not_counted() -> None:
    """Catches the passes of a second monitor, or of ``measure``, taken for training batches."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitors = [StabilityMonitor(optimizer, model, MSE, (X, Y), every=1) for _ in range(2)]
    for _ in range(3):
        stableopt.measure(model, MSE, (X, Y), optimizer=optimizer)
        train(model, optimizer)
    assert [m.batch_size for monitor in monitors for m in monitor.history] == [4] * 6


def test_ragged_last_batch_does_not_count() -> None:
    """Catches limits that jump at the end of each epoch: the median is the epoch's batch size."""
    model, optimizer, monitor = start()
    for rows in (slice(0, 5), slice(5, 10), slice(10, 12), slice(0, 5)):
        train(model, optimizer, rows=rows)
    assert [m.batch_size for m in monitor.history] == [5] * 4


@pytest.mark.parametrize("tracked", ["model", "compiled"])
def test_batch_size_of_a_compiled_model(tracked: str) -> None:
    """Catches a hook on one of the two modules that a call of the other passes by."""
    model = linear()
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model if tracked == "model" else compiled, MSE, (X, Y), every=1)
    train(compiled, optimizer, 2)
    torch._dynamo.reset()
    assert [(m.batch_size, m.failure) for m in monitor.history] == [(4, None)] * 2


def test_batch_size_and_dataset_size_as_given() -> None:
    """Catches given sizes overruled by what the forward passes or the probe set show."""
    model, optimizer, monitor = start(batch_size=6, dataset_size=100)
    train(model, optimizer)
    assert monitor.margins is not None
    assert (monitor.margins.batch_size, monitor.margins.dataset_size) == (6, 100)
    assert monitor.margins.non_uniformity_limit == limit(0.1, 6, 100)


def test_observed_batch_above_the_probe_set() -> None:
    """Catches a finite-n limit for a probe set that cannot be the training set, and silence."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X[:3], Y[:3]), every=1)
    with pytest.warns(RuntimeWarning, match="more samples than the 3 probe samples") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1
    assert [(m.batch_size, m.dataset_size, m.failure) for m in monitor.history] == [
        (4, None, None)
    ] * 3
    assert monitor.history[0].non_uniformity_limit == limit(0.1, 4, math.inf)


def test_observed_batch_above_the_given_dataset_size() -> None:
    """Catches a contradiction of what the user said that passes without a word."""
    model, optimizer, monitor = start(dataset_size=2)
    with pytest.warns(RuntimeWarning, match="dataset_size=2"):
        train(model, optimizer, 2)
    assert ["dataset_size=2" in str(m.failure) for m in monitor.history] == [True] * 2


# -- what it refuses -----------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"every": 0}, "every=0"),
    ({"every": -1}, "every=-1"),
    ({"every": True}, "every=True"),
    ({"every": 1.5}, r"every=1\.5"),
    ({"every": None, "max_overhead": 0}, "max_overhead=0"),
    ({"every": None, "max_overhead": -1}, "max_overhead=-1"),
    ({"every": None, "max_overhead": math.nan}, "max_overhead=nan"),
    ({"every": None, "max_overhead": math.inf}, "max_overhead=inf"),
    ({"every": 5, "max_overhead": 0.1}, "every and max_overhead"),
    ({"cold_every": -1}, "cold_every=-1"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 13}, "batch_size=13 is above dataset_size=12"),
    ({"batch_size": 6, "dataset_size": 5}, "batch_size=6 is above dataset_size=5"),
    ({"dataset_size": 0}, "dataset_size=0"),
    ({"tol": 0.0}, r"tol=0\.0"),
    ({"tol": math.nan}, "tol=nan"),
    ({"max_iter": 0}, "max_iter=0"),
    ({"chunk_size": 0}, "chunk_size=0"),
    ({"quantities": "sharpness"}, "quantities='sharpness'"),
    ({"quantities": ()}, "quantities="),
    ({"quantities": ("flatness",)}, "flatness"),
    ({"params": []}, "params is empty"),
    ({"data": None}, "data"),
    ({"loss_fn": None}, "loss_fn"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_arguments_out_of_range(options: dict[str, Any], says: str) -> None:
    """Catches a bad argument found by the first measurement only, or one that leaves hooks behind."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    arguments = {"loss_fn": MSE, "data": (X, Y), "every": 1, **options}
    with pytest.raises(ValueError, match=says):
        optimizer.track(model, **arguments)
    assert hooks_left(optimizer, model) == 0
    assert optimizer.monitor is None


def test_problem_with_arguments_that_are_its_own() -> None:
    """Catches a loss or data given beside a Problem, and ignored."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    problem = stableopt.Problem(model, MSE, (X, Y))
    with pytest.raises(ValueError, match="a Problem has its own"):
        optimizer.track(problem, MSE)
    assert hooks_left(optimizer, model) == 0
    monitor = optimizer.track(problem, every=1)
    train(model, optimizer)
    assert monitor.margins is not None
    assert (monitor.margins.batch_size, monitor.margins.failure) == (4, None)


def test_parameter_that_the_optimizer_does_not_hold() -> None:
    """Catches a sharpness of parameters that never move; ``params=`` or freezing are ways out."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = stableopt.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'1\.weight' is trainable but not in the optimizer"):
        optimizer.track(model, MSE, (X, Y))
    assert hooks_left(optimizer, model) == 0
    monitor = optimizer.track(model, MSE, (X, Y), every=1, params=model[0].parameters())
    assert monitor.problem.num_params == 6
    model[1].requires_grad_(False)
    assert optimizer.track(model, MSE, (X, Y), every=1).problem.num_params == 6


def test_parameter_that_the_model_does_not_hold() -> None:
    """Catches a step that moves more than the model, as with two networks in one optimizer."""
    model, other = linear(), linear()
    optimizer = stableopt.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="holds 1 parameters that are not the model's"):
        optimizer.track(model, MSE, (X, Y))
    assert hooks_left(optimizer, model) == 0
    optimizer.track(model, MSE, (X, Y), every=1, params=model.parameters())


def test_optimizer_of_unknown_rule() -> None:
    """Catches Rprop measured against SGD's limits; a rule given, or read by a function, is used."""
    model = linear()
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"UpdateRule\.register\(Rprop.*update_rule="):
        StabilityMonitor(optimizer, model, MSE, (X, Y))
    assert hooks_left(optimizer, model) == 0
    given = StabilityMonitor(optimizer, model, MSE, (X, Y), every=1, update_rule=UpdateRule(lr=0.5))
    read = StabilityMonitor(
        optimizer,
        model,
        MSE,
        (X, Y),
        every=1,
        update_rule=lambda optimizer: UpdateRule(lr=optimizer.param_groups[0]["lr"]),
    )
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    train(model, optimizer)
    assert [m.sharpness_limit for m in given.history] == [4.0, 4.0]
    assert [m.sharpness_limit for m in read.history] == [20.0, 8.0]


# -- failures that must not stop training --------------------------------------------------------


def test_loss_that_is_not_finite() -> None:
    """Catches NaN recorded as a value, a warning at each step, and failure that outlasts its cause."""
    model, optimizer, monitor = start()
    train(model, optimizer)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="step 2 failed: not finite: the loss is nan") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1
    with torch.no_grad():
        model.weight.fill_(1.0)
    train(model, optimizer)
    assert [m.failure is None for m in monitor.history] == [True, False, False, False, True]
    failed = monitor.history[1]
    assert (failed.sharpness, failed.stable, failed.converged) == (None, None, False)
    assert failed.record()["failed"] == 1.0
    assert failed.sharpness_limit == 20.0


def test_model_that_fails_on_the_probe_set() -> None:
    """Catches an exception of a measurement that ends training; ``measure`` itself does raise."""

    class Moody(nn.Linear):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fail and not self.training:
                raise RuntimeError("not now")
            return super().forward(x)

    model = Moody(2, 1)
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer)
    model.fail = True
    with pytest.warns(RuntimeWarning, match="step 2 failed: RuntimeError: not now") as caught:
        train(model, optimizer, 2)
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="not now"):
        monitor.measure()
    model.fail = False
    train(model, optimizer)
    expected = [None, "RuntimeError: not now", "RuntimeError: not now", None]
    assert [m.failure for m in monitor.history] == expected
    assert model.training


def test_measurement_that_does_not_converge() -> None:
    """Catches a value short of its tolerance that is passed off as one that reached it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1, max_iter=1, tol=1e-6)
    with pytest.warns(RuntimeWarning, match="did not converge.*raise max_iter or tol") as caught:
        train(model, optimizer, 2)
    assert len(caught) == 1
    assert [m.converged for m in monitor.history] == [False, False]
    assert [m.failure for m in monitor.history] == [None, None]


def test_failing_sink() -> None:
    """Catches a full disk that ends training, or one sink that keeps the next from its record."""
    records: list[tuple[int, dict[str, float]]] = []

    def spoil(step: int, record: dict[str, float]) -> None:
        record.clear()
        raise OSError("disk full")

    model, optimizer, monitor = start(
        sinks=[spoil, lambda step, record: records.append((step, record))]
    )
    with pytest.warns(RuntimeWarning, match="disk full") as caught:
        train(model, optimizer, 2)
    assert len(caught) == 1
    assert [step for step, _ in records] == [1, 2]
    assert [record for _, record in records] == [m.record() for m in monitor.history]


# -- life cycle ----------------------------------------------------------------------------------


class Sink:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.flushed = 0

    def __call__(self, step: int, record: dict[str, float]) -> None:
        self.steps.append(step)

    def flush(self) -> None:
        self.flushed += 1


def test_close_detaches() -> None:
    """Catches a hook that survives, and history that does not."""
    sink = Sink()
    model, optimizer, monitor = start(sinks=[sink])
    train(model, optimizer)
    assert hooks_left(optimizer, model) == 2  # the step's and the forward pass's
    monitor.close()
    assert hooks_left(optimizer, model) == 0
    train(model, optimizer)
    assert (sink.steps, sink.flushed, monitor.step) == ([1], 1, 1)
    assert monitor.margins is not None
    monitor.close()  # a second time does no harm


def test_context_closes_whatever_happens() -> None:
    """Catches hooks left by a training loop that raises, and an exception that is swallowed."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    sink = Sink()
    monitor = StabilityMonitor(optimizer, model, MSE, (X, Y), every=1, sinks=[sink])

    def loop() -> None:
        with monitor as entered:
            assert entered is monitor
            train(model, optimizer)
            raise KeyError("a bug of the loop")

    with pytest.raises(KeyError, match="a bug of the loop"):
        loop()
    assert hooks_left(optimizer, model) == 0
    assert (sink.flushed, len(monitor.history)) == (1, 1)


def test_tracking_again_closes_the_first() -> None:
    """Catches two monitors that both measure, and a refused ``track`` that ends the one before."""
    sink = Sink()
    model, optimizer, first = start(sinks=[sink])
    train(model, optimizer)
    with pytest.raises(ValueError, match="every=0"):
        optimizer.track(model, MSE, (X, Y), every=0)
    assert optimizer.monitor is first
    train(model, optimizer)
    second = optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer)
    assert optimizer.monitor is second
    assert (first.step, second.step) == (2, 1)
    assert (sink.steps, sink.flushed) == ([1, 2], 1)
    assert hooks_left(optimizer, model) == 2
    assert optimizer.margins is second.margins


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def timeless(monitor: StabilityMonitor) -> Iterator[dict[str, Any]]:
    """Yield each margin as plain values, less the wall times."""
    for margins in monitor.history:
        plain = margins.to_dict()
        for measurement in plain["measurements"].values():
            del measurement["seconds"]
        yield plain


@pytest.mark.parametrize("break_at", [1, 3, 4])
def test_resumed_monitor_continues_bit_for_bit(break_at: int) -> None:
    """Catches anything lost in a checkpoint: warm starts, seeds, the cold cycle, what is pending."""
    # Step 4 moves nothing, so that a break there leaves a measurement due.
    lrs = [0.05, 0.05, 0.05, 0.0, 0.05, 0.05, 0.05, 0.05]

    def build() -> tuple[nn.Module, stableopt.SGD, StabilityMonitor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
        optimizer = stableopt.SGD(model.parameters(), lr=0.05, momentum=0.9)
        quantities = ("sharpness", "non_uniformity")
        monitor = optimizer.track(model, MSE, (X, Y), every=2, quantities=quantities, cold_every=2)
        return model, optimizer, monitor

    def go(model: nn.Module, optimizer: stableopt.SGD, steps: range) -> None:
        for step in steps:
            optimizer.param_groups[0]["lr"] = lrs[step]
            train(model, optimizer, rows=slice(0, 3 + step))

    model, optimizer, whole = build()
    go(model, optimizer, range(8))

    model, optimizer, first = build()
    go(model, optimizer, range(break_at))
    state = through_file([model.state_dict(), optimizer.state_dict(), first.state_dict()])
    model, optimizer, second = build()
    for part, saved in zip((model, optimizer, second), state, strict=True):
        part.load_state_dict(saved)
    go(model, optimizer, range(break_at, 8))

    assert [m.step for m in whole.history] == [2, 5, 6, 8]
    assert second.step == 8
    assert list(timeless(second)) == list(timeless(whole))


def test_state_of_another_model_is_refused() -> None:
    """Catches an eigenvector of another size that only the next measurement would trip over."""
    model, optimizer, monitor = start()
    train(model, optimizer)
    state = monitor.state_dict()
    wider = nn.Linear(3, 1)
    other = stableopt.SGD(wider.parameters(), lr=0.1).track(
        wider, MSE, (torch.ones(2, 3), torch.ones(2, 1)), every=1
    )
    with pytest.raises(ValueError, match=r"sharpness has shape \(2, 2\).*4 parameters"):
        other.load_state_dict(state)
    assert other.step == 0


# -- what it measures ----------------------------------------------------------------------------


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the Hessian by plain nested loops over the parameters' gradient."""
    params = list(model.parameters())
    gradients = torch.autograd.grad(MSE(model(x), y), params, create_graph=True)
    rows = []
    for entry in torch.cat([g.reshape(-1) for g in gradients]):
        row = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.reshape(-1) for r in row]))
    return torch.stack(rows)


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.3, 0.3), (0.0, 0.7)], ids=str)
@pytest.mark.parametrize("lrs", [(0.1, 0.1), (0.02, 0.1)], ids=str)
def test_sharpness_of_groups_is_that_of_the_dense_matrix(
    lrs: tuple[float, float], decays: tuple[float, float], maximize: bool
) -> None:
    r"""Catches a wrong scale, square root, sign or decay: :math:`P^{1/2}(\pm H+\Lambda)P^{1/2}`.

    Whether in limit or matrix, the edge is where the update's own linearisation has radius 1.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = X.double(), Y.double()
    groups = [
        {"params": part.parameters(), "lr": lr, "weight_decay": decay}
        for part, lr, decay in zip((model[0], model[2]), lrs, decays, strict=True)
    ]
    optimizer = stableopt.SGD(groups, lr=1.0, maximize=maximize)
    monitor = optimizer.track(model, MSE, (x, y), every=1, tol=1e-9, batch_size=4)
    margins = monitor.measure()

    sizes = [9, 4]
    spread = torch.tensor(sizes)
    rates = torch.tensor(lrs, dtype=torch.float64).repeat_interleave(spread)
    decay = torch.tensor(decays, dtype=torch.float64).repeat_interleave(spread)
    hessian = dense_hessian(model, x, y) * (-1 if maximize else 1)
    # The step itself: theta <- theta - R (+-H + Lambda) theta, symmetric after a similarity.
    root = rates.sqrt()
    step = root[:, None] * (hessian + torch.diag(decay)) * root
    top = float(torch.linalg.eigvalsh(step)[-1])
    # Unstable exactly where an eigenvalue of the step passes 2. The solver's error is of the order
    # of tol^2, 1e-18, so rounding in another order is all there is.
    shared = decays[0] if lrs[0] == lrs[1] and decays[0] == decays[1] else 0.0
    same = len(set(lrs)) == len(set(decays)) == 1
    found, limit = (
        (margins.sharpness, margins.sharpness_limit)
        if same
        else (margins.preconditioned_sharpness, margins.preconditioned_sharpness_limit)
    )
    assert found is not None
    assert limit == pytest.approx(2 / max(lrs) - shared, rel=1e-12)
    assert found + shared == pytest.approx(top / max(lrs), rel=1e-12)
    # Plain sharpness is H's whatever the groups, and has a limit only where the step is plain.
    plain = float(torch.linalg.eigvalsh(hessian)[-1])
    assert margins.sharpness == pytest.approx(plain, rel=1e-12)
    assert (margins.sharpness_limit is None) == (not same)
    assert margins.lr == max(lrs)
    loss = float(MSE(model(x), y).detach())
    assert margins.loss == pytest.approx(loss, rel=1e-12)  # rounding alone


def test_warm_starts_and_fresh_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a search that never starts afresh, which could follow an overtaken eigenvector on."""
    given: list[tuple[set[str], int]] = []
    measure_at = stableopt.monitor.monitor.measure_at

    def recorded(*args: Any, **kwargs: Any) -> Any:
        given.append((set(kwargs["starts"]), kwargs["seed"]))
        return measure_at(*args, **kwargs)

    monkeypatch.setattr(stableopt.monitor.monitor, "measure_at", recorded)
    model, optimizer, _ = start(cold_every=2, seed=7)
    train(model, optimizer, 7)
    cold, warm = set[str](), {"sharpness"}
    assert [starts for starts, _ in given] == [cold, warm, warm, cold, warm, warm, cold]
    assert [seed for _, seed in given] == list(range(7, 14))


def test_history_holds_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a history that grows with the run, or that drops its latest entries."""
    monkeypatch.setattr(stableopt.monitor.monitor, "_HISTORY", 3)
    model, optimizer, monitor = start()
    train(model, optimizer, 5)
    assert [m.step for m in monitor.history] == [3, 4, 5]
    assert monitor.margins is monitor.history[-1]


def test_no_warning_in_a_healthy_run() -> None:
    """Catches a warning about nothing, which would teach users to ignore them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, monitor = start(quantities=("sharpness", "non_uniformity", "theorem1"))
        train(model, optimizer, 3)
    assert all(m.converged for m in monitor.history)
    assert len(monitor.history) == 3


# -- what a measurement must not touch, and what it must not miss -----------------------------------


class Remembers(nn.Module):
    """Keeps a state of its own that enters its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.state = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x) + 0.1 * self.state
        self.state = out.detach().mean(0)
        return out


class Averaging(nn.Module):
    """A loss with a running mean, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        loss = MSE(output, y) + 0.01 * self.mean
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss


@pytest.mark.parametrize(
    ("make_model", "make_loss"),
    [
        (Remembers, nn.MSELoss),
        (linear, Averaging),
        (lambda: nn.Sequential(nn.ReLU(inplace=True), linear()), nn.MSELoss),
    ],
    ids=["state of the model", "state of the loss", "inputs in place"],
)
def test_states_and_inputs_are_left_alone(make_model: Any, make_loss: Any) -> None:
    """Catches attributes, buffers of the loss, or probe data that a measurement moves on."""
    results = []
    for tracked in (False, True):
        torch.manual_seed(0)
        model, loss_fn, x = make_model(), make_loss(), X.clone()
        optimizer = stableopt.SGD(model.parameters(), lr=0.1)
        if tracked:
            monitor = optimizer.track(model, loss_fn, (x, Y), every=1)
        for _ in range(4):
            optimizer.zero_grad()
            loss_fn(model(x.clone()), Y).backward()
            optimizer.step()
        results.append([*(p.detach() for p in model.parameters()), *loss_fn.buffers(), x])
    assert [m.failure for m in monitor.history] == [None] * 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_replaced_layers_are_followed() -> None:
    """Catches curvature of parameters that the model no longer has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = X.double(), Y.double()

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()

    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (x, y), every=1, tol=1e-9)
    train(model, optimizer)
    model[2] = nn.Linear(4, 1).double()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer)
    expected = stableopt.measure(model, MSE, (x, y), tol=1e-9, quantities=("sharpness",))
    assert monitor.margins is not None
    assert monitor.margins.sharpness == pytest.approx(expected.sharpness, rel=1e-9)
    model[2].requires_grad_(False)
    train(model, optimizer)
    assert monitor.problem.num_params == 12
    assert monitor.margins.failure is None


def test_a_packed_sequence_is_counted_and_left_alone() -> None:
    """Catches a hook that rebuilds the user's containers, and rows of time taken for samples."""
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(2, 3), nn.Linear(3, 1)

        def forward(self, x: Any) -> Tensor:
            return self.head(self.rnn(x)[1][-1])

    model = Recurrent()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 6, 2), torch.randn(4, 1)
    problem = stableopt.Problem.from_batch_loss(
        model, lambda model, batch: MSE(model(batch[0].transpose(0, 1)), batch[1]), [(x, y)]
    )
    monitor = optimizer.track(problem, every=1)
    lengths = torch.tensor([6, 4, 3, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    MSE(model(packed), y).backward()
    optimizer.step()
    assert monitor.batch_size == 4


class Grumpy:
    def __call__(self, step: int, record: dict[str, float]) -> None:
        raise OSError("disk full")

    def flush(self) -> None:
        raise OSError("disk full")

    def __repr__(self) -> str:
        raise RuntimeError("not even a name")


def test_a_sink_that_fails_in_every_way_ends_nothing() -> None:
    """Catches a failing `repr` or `flush`, a record told twice, and sinks left unflushed."""
    flushed, told = [], []

    class Good:
        def __call__(self, step: int, record: dict[str, float]) -> None:
            told.append(step)

        def flush(self) -> None:
            flushed.append(True)

    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1, sinks=[Grumpy(), Good()])
    with pytest.warns(RuntimeWarning, match="the sink Grumpy failed"), monitor:
        train(model, optimizer)
    assert flushed == [True]
    assert told == [1]
    assert len(monitor.history) == 1


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"sinks": "runs"}, TypeError, "sinks='runs'"),
        ({"sinks": [None]}, TypeError, "None is not a callable"),
        ({"sinks": [Grumpy]}, TypeError, "is not a callable"),
        ({"batch_size": 2.5}, ValueError, "batch_size=2.5"),
        ({"batch_size": True}, ValueError, "batch_size=True"),
        ({"dataset_size": float("nan")}, ValueError, "dataset_size=nan"),
        ({"max_iter": 2.5}, ValueError, "max_iter=2.5"),
        ({"seed": "a"}, ValueError, "seed='a'"),
        ({"cold_every": None}, ValueError, "cold_every=None"),
        ({"max_overhead": "5"}, ValueError, "max_overhead='5'"),
        ({"tol": None}, ValueError, "tol=None"),
        ({"quantities": None}, ValueError, "quantities=None"),
        ({"update_rule": 5}, TypeError, "update_rule=5"),
        ({"update_rule": lambda optimizer: None}, TypeError, "expected an UpdateRule"),
        ({"params": ["0.weight"]}, TypeError, "params="),
    ],
)
def test_values_of_the_wrong_kind_are_named(options: Any, kind: Any, says: str) -> None:
    """Catches an error of Python's that names no argument, and a value found bad only later."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    with pytest.raises(kind, match=says):
        optimizer.track(model, MSE, (X, Y), **options)
    assert not optimizer._optimizer_step_post_hooks
    assert not model._forward_pre_hooks


def test_numpy_integers_are_integers() -> None:
    """Catches a checkpoint that `weights_only` refuses because of a NumPy scalar in it."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    sizes = {"every": np.int64(1), "batch_size": np.int64(2), "dataset_size": np.int64(9)}
    monitor = optimizer.track(model, MSE, (X, Y), **sizes)
    train(model, optimizer)
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["history"][0]["batch_size"] == 2


def test_a_bad_checkpoint_changes_nothing() -> None:
    """Catches a monitor left half loaded."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer)
    state = monitor.state_dict()
    with pytest.raises(ValueError, match="state_dict lacks"):
        monitor.load_state_dict({"starts": {}})
    with pytest.raises(KeyError):
        monitor.load_state_dict({**state, "step": 99, "history": [{}]})
    assert monitor.step == 1
    assert len(monitor.history) == 1
    assert monitor.state_dict()["starts"]


def test_parallel_wrappers_are_measured_as_the_module_inside() -> None:
    """Catches a forward pass of DDP in a measurement: it talks to other processes."""

    class Wrapper(nn.DataParallel):
        def forward(self, *args: Any) -> Any:
            raise AssertionError("the wrapper was called")

    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(Wrapper(model), MSE, (X, Y), every=1)
    assert monitor.measure().failure is None


def test_losses_that_weigh_samples_are_named() -> None:
    """Catches class weights, whose mean over chunks is another loss."""
    torch.manual_seed(0)
    model, labels = nn.Linear(2, 3), torch.arange(12) % 3
    equal = nn.CrossEntropyLoss()
    stableopt.Problem(model, equal, (X, labels))
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0, 0.1]))
    with torch.no_grad():
        model.weight.mul_(5)
    with pytest.warns(UserWarning, match="weighs samples unequally"):
        stableopt.Problem(model, weighted, (X, labels))
