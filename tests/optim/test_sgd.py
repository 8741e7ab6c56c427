"""``stableopt.SGD`` against its oracle ``torch.optim.SGD``: equal is ``torch.equal``, always."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import stableopt

SHAPES = [(3, 2), (5,), (1,)]
"""More than one parameter, so that foreach and fused paths have lists to walk."""

ARITHMETIC = [
    dict(
        zip(("momentum", "dampening", "nesterov", "weight_decay", "maximize"), values, strict=True)
    )
    for values in itertools.product((0, 0.9), (0, 0.3), (False, True), (0, 0.1), (False, True))
]
IMPLEMENTATIONS = [
    dict(zip(("foreach", "fused", "differentiable"), values, strict=True))
    for values in itertools.product((None, False, True), (None, False, True), (False, True))
]


def accepted(options: dict[str, Any]) -> bool:
    """Whether torch documents the combination as allowed."""
    nesterov_fits = options["momentum"] > 0 and options["dampening"] == 0
    return nesterov_fits or not options["nesterov"]


def name_of(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items() if value is not None)


def random_tensors(shapes: Iterable[Any], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def descend(
    kind: type[torch.optim.SGD],
    options: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 4,
) -> list[Tensor] | type[Exception]:
    """Return parameters and momentum buffers after ``steps``, or the type of the error.

    Differentiable steps add the gradient of the result in the initial parameters.
    """
    leaves = [nn.Parameter(t) for t in random_tensors(SHAPES, dtype, seed=0)]
    differentiable = options.get("differentiable", False)
    params: list[Tensor] = [p.clone() for p in leaves] if differentiable else list(leaves)
    try:
        optimizer = kind(params, **options)
        for step in range(steps):
            slopes = random_tensors(SHAPES, dtype, seed=1 + step)
            for p, slope in zip(params, slopes, strict=True):
                p.grad = p * slope if differentiable else p.detach() * slope
            optimizer.step()
    except (RuntimeError, ValueError) as error:
        return type(error)
    state = [optimizer.state[p].get("momentum_buffer") for p in params]
    results = params + [buffer for buffer in state if buffer is not None]
    if differentiable and not options["foreach"]:
        # Torch's foreach steps overwrite what this graph needs.
        results += torch.autograd.grad(sum(p.square().sum() for p in params), leaves)
    return [t.detach() for t in results]


def same(left: list[Tensor] | type[Exception], right: list[Tensor] | type[Exception]) -> bool:
    if isinstance(left, type) or isinstance(right, type):
        return left is right
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=name_of)
def test_every_combination_of_options_is_torchs(
    implementation: dict[str, Any], tensor_lr: bool
) -> None:
    """Catches an option that is dropped, or refused, in one combination only: the full grid."""
    clash = implementation["fused"] and (
        implementation["foreach"] or implementation["differentiable"]
    )
    for arithmetic in ARITHMETIC:
        options = {"lr": 0.1, **arithmetic, **implementation}
        if tensor_lr:
            options["lr"] = torch.tensor(0.1)
        ours = descend(stableopt.SGD, options)
        assert same(ours, descend(torch.optim.SGD, options)), options
        # Were everything refused, the comparison above would compare error types only.
        assert isinstance(ours, list) == (accepted(options) and not clash), (options, ours)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex64, torch.complex128, torch.bfloat16]
)
@pytest.mark.parametrize(
    "path", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str
)
def test_other_dtypes_are_torchs(dtype: torch.dtype, path: dict[str, Any]) -> None:
    """Catches arithmetic of our own that casts or conjugates, which float32 cannot show."""
    for arithmetic in filter(accepted, ARITHMETIC):
        options = {"lr": 0.1, **arithmetic, **path}
        ours = descend(stableopt.SGD, options, dtype=dtype)
        assert same(ours, descend(torch.optim.SGD, options, dtype=dtype)), options
        # The fused kernel takes no complex numbers; everything else must have run.
        assert isinstance(ours, list) == (not (dtype.is_complex and "fused" in path))


def grouped(kind: type[torch.optim.SGD]) -> list[Tensor]:
    params = [nn.Parameter(t) for t in random_tensors([(4,)] * 5, torch.float32, seed=3)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "lr": 0.3, "weight_decay": 0.2},
        {"params": params[2:3], "momentum": 0.5, "dampening": 0.1, "foreach": True},
        {"params": params[3:], "momentum": 0.9, "nesterov": True, "maximize": True, "fused": True},
    ]
    optimizer = kind(groups, lr=0.1)
    for step in range(4):
        gradients = random_tensors([(4,)] * 5, torch.float32, seed=4 + step)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        params[4].grad = None if step < 2 else params[4].grad
        if step == 2:
            # The fused kernel wants all buffers or none.
            optimizer.param_groups[3]["fused"] = False
        optimizer.step()
    return [p.detach() for p in params] + [
        optimizer.state[p]["momentum_buffer"] for p in params[2:]
    ]


def test_groups_with_different_options_are_torchs() -> None:
    """Catches one group's option used for all, and state lost for a parameter without gradient."""
    assert same(grouped(stableopt.SGD), grouped(torch.optim.SGD))


def with_sparse_gradients(kind: type[torch.optim.SGD], options: dict[str, Any]) -> Any:
    weight = random_tensors([(6, 3)], torch.float32, seed=0)[0]
    table = nn.Embedding.from_pretrained(weight, freeze=False, sparse=True)
    try:
        optimizer = kind(table.parameters(), lr=0.1, **options)
        for rows in ([0, 2, 2], [1, 2, 5], [0, 0, 0]):
            optimizer.zero_grad()
            table(torch.tensor(rows)).square().sum().backward()
            assert table.weight.grad is not None
            assert table.weight.grad.is_sparse
            optimizer.step()
    except (RuntimeError, ValueError) as error:
        return type(error)
    return [table.weight.detach()]


@pytest.mark.parametrize(
    "options", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str
)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_gradients_are_torchs(options: dict[str, Any], momentum: float) -> None:
    """Catches a step that makes gradients dense, or takes a sparse one where torch refuses."""
    options = {"momentum": momentum, **options}
    ours = with_sparse_gradients(stableopt.SGD, options)
    assert same(ours, with_sparse_gradients(torch.optim.SGD, options))
    assert isinstance(ours, list) == ("fused" not in options)


def test_tracked_sparse_gradients() -> None:
    """Catches curvature code that cannot take a sparse gradient, or drops rows that repeat.

    The dense embedding is the oracle: the same function, so the same curvature.
    """
    rows = torch.tensor([0, 2, 2, 1, 5, 2])
    targets = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    weight = random_tensors([(6, 2)], torch.float64, seed=0)[0]

    def run(sparse: bool, tracked: bool) -> tuple[list[Tensor], Any]:
        table = nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=sparse)
        head = nn.Linear(2, 1).double()
        with torch.no_grad():
            head.weight.fill_(0.5)
            head.bias.zero_()
        model = nn.Sequential(table, nn.Tanh(), head)
        optimizer = stableopt.SGD(model.parameters(), lr=0.1)
        if tracked:
            optimizer.track(model, nn.MSELoss(), (rows, targets), every=1, tol=1e-10)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(rows), targets).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()], optimizer.monitor

    weights, monitor = run(sparse=True, tracked=True)
    assert same(weights, run(sparse=True, tracked=False)[0])
    _, dense = run(sparse=False, tracked=True)
    assert [m.failure for m in monitor.history] == [None] * 3
    # Weights may differ by the rounding of sums, and eigenvalues by it and tol^2: 1e-20.
    assert [m.sharpness for m in monitor.history] == pytest.approx(
        [m.sharpness for m in dense.history], rel=1e-12
    )


# -- tracked runs ------------------------------------------------------------------------------

X = torch.linspace(-1, 1, 12).reshape(6, 2)
Y = X.sum(1, keepdim=True).sin()


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    with torch.no_grad():
        for p, value in zip(
            model.parameters(),
            random_tensors([p.shape for p in model.parameters()], torch.float32, seed=5),
            strict=True,
        ):
            p.copy_(value)
    return model


def backward(model: nn.Module, step: int) -> Tensor:
    rows = slice(step % 3, step % 3 + 3)
    loss = nn.functional.mse_loss(model(X[rows]), Y[rows])
    loss.backward()
    return loss.detach()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int] = range(4)
) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return weights(model)


def track(optimizer: stableopt.SGD, model: nn.Module, **options: Any) -> stableopt.StabilityMonitor:
    # 9 parameters: 9 products reach any eigenvalue, so that nothing is left to converge.
    return optimizer.track(model, nn.MSELoss(), (X, Y), **{"every": 1, **options})


TRACKED = [
    {**arithmetic, **path}
    for arithmetic in filter(accepted, ARITHMETIC)
    for path in ({"foreach": False}, {"foreach": True}, {"fused": True})
]


@pytest.mark.parametrize("options", TRACKED, ids=name_of)
def test_tracked_run_is_the_untracked_one(options: dict[str, Any]) -> None:
    """Catches a measurement that shifts weights or momentum, on any path of the step."""
    model, other = network(), network()
    optimizer = stableopt.SGD(model.parameters(), lr=torch.tensor(0.05), **options)
    reference = torch.optim.SGD(other.parameters(), lr=torch.tensor(0.05), **options)
    monitor = track(optimizer, model, every=2)
    assert same(fit(model, optimizer), fit(other, reference))
    assert [(m.step, m.failure) for m in monitor.history] == [(2, None), (4, None)]


def test_tracked_groups_run_as_the_untracked() -> None:
    """Catches the change of coordinates for several groups being written into the parameters."""
    model, other = network(), network()

    def groups(model: Any) -> list[dict[str, Any]]:
        return [
            {"params": model[0].parameters(), "lr": 0.2, "weight_decay": 0.1},
            {"params": model[2].parameters()},
        ]

    optimizer = stableopt.SGD(groups(model), lr=0.05, momentum=0.5)
    monitor = track(optimizer, model)
    assert same(
        fit(model, optimizer), fit(other, torch.optim.SGD(groups(other), lr=0.05, momentum=0.5))
    )
    assert all(m.failure is None for m in monitor.history)
    assert len(monitor.history) == 4


# -- checkpoints and copies ----------------------------------------------------------------------


def through_file(value: Any, *, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


OPTIONS = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("before", "after"),
    [(stableopt.SGD, torch.optim.SGD), (torch.optim.SGD, stableopt.SGD)],
    ids=["to_torch", "from_torch"],
)
def test_checkpoints_are_exchanged_with_torch(before: Any, after: Any) -> None:
    """Catches keys that torch does not know, and objects that weights_only loading refuses."""
    other = network()
    reference = torch.optim.SGD(other.parameters(), **OPTIONS)
    fit(other, reference, range(3))

    model = network()
    optimizer = before(model.parameters(), **OPTIONS)
    if isinstance(optimizer, stableopt.SGD):
        track(optimizer, model)
    fit(model, optimizer, range(3))
    state, weight = through_file((optimizer.state_dict(), model.state_dict()))
    assert state["param_groups"] == reference.state_dict()["param_groups"]
    assert {k: set(v) for k, v in state["state"].items()} == {
        k: {"momentum_buffer"} for k in range(4)
    }

    resumed = network()
    resumed.load_state_dict(weight)
    # Other options, so that what is loaded has something to overwrite.
    successor = after(resumed.parameters(), lr=1.0)
    if isinstance(successor, stableopt.SGD):
        track(successor, resumed)
    successor.load_state_dict(state)
    assert same(fit(resumed, successor, range(3, 6)), fit(other, reference, range(3, 6)))


def copied(pair: Any, way: str) -> Any:
    if way == "deepcopy":
        return copy.deepcopy(pair)
    if way == "pickle":
        return pickle.loads(pickle.dumps(pair))
    return through_file(pair, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_tracked_pair_train_on_untracked(way: str) -> None:
    """Catches a monitor that is copied along, measures twice, or counts the copy's batches."""
    model = network()
    optimizer = stableopt.SGD(model.parameters(), **OPTIONS)
    monitor = track(optimizer, model)
    fit(model, optimizer, range(2))
    twin, twin_optimizer = copied((model, optimizer), way)
    assert type(twin_optimizer) is stableopt.SGD
    assert twin_optimizer.monitor is None
    assert twin_optimizer.margins is None
    final = fit(twin, twin_optimizer, range(2, 5))
    assert monitor.step == 2
    assert same(fit(model, optimizer, range(2, 5)), final)
    assert monitor.step == 5
    # Batches of 3 each; those of the twin, counted here too, would make one of 12.
    assert list(monitor._observed) == [3] * 5


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_tracked_model_have_nothing_to_do_with_the_monitor(way: str) -> None:
    """Catches a model hook that drags optimizer, monitor or a local function into the copy."""
    model = network()
    optimizer = stableopt.SGD(model.parameters(), lr=0.05)
    monitor = track(optimizer, model, sinks=[lambda step, record: None])  # not to be pickled
    twin = copied(model, way)
    backward(twin, 0)
    fit(model, optimizer, range(1))
    assert list(monitor._observed) == [3]
    assert same(weights(twin), weights(network()))


def test_group_added_while_tracked() -> None:
    """Catches parameters that are read once: a group may come later, as when layers thaw."""

    def run(kind: Any, tracked: bool) -> list[Tensor]:
        model: Any = network()
        model[2].requires_grad_(False)
        optimizer = kind(model[0].parameters(), lr=0.1, momentum=0.9)
        monitor = track(optimizer, model) if tracked else None
        fit(model, optimizer, range(2))
        model[2].requires_grad_(True)
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})
        fit(model, optimizer, range(2, 5))
        if monitor is not None:
            assert [m.failure for m in monitor.history] == [None] * 5
            assert [m.lr for m in monitor.history] == [0.1, 0.1, 0.2, 0.2, 0.2]
        return weights(model)

    assert same(run(stableopt.SGD, True), run(torch.optim.SGD, False))


# -- what works beside an optimizer --------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.7)],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_and_its_limits(name: str) -> None:
    """Catches limits computed from the learning rate (or momentum) that training began with."""

    def run(kind: Any) -> tuple[list[Tensor], list[tuple[float, float]], Any]:
        model = network()
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
        # Before the scheduler, which wraps `step` on the instance.
        monitor = track(optimizer, model) if kind is stableopt.SGD else None
        scheduler = SCHEDULERS[name](optimizer)
        used = []
        for step in range(6):
            used.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
            optimizer.zero_grad()
            loss = backward(model, step)
            optimizer.step()
            scheduler.step(*([loss] if name == "ReduceLROnPlateau" else []))
        return weights(model), used, monitor

    ours, used, monitor = run(stableopt.SGD)
    reference, expected, _ = run(torch.optim.SGD)
    assert same(ours, reference)
    assert used == expected
    assert len(set(used)) > 1
    assert [m.lr for m in monitor.history] == [lr for lr, _ in used]
    # Two divisions and a product of exactly the same numbers: a few units in the last place.
    assert [m.sharpness_limit for m in monitor.history] == pytest.approx(
        [2 * (1 + momentum) / lr for lr, momentum in used], rel=1e-15 * 8
    )


def scaled_run(
    kind: Any, *, fused: bool, overflow_at: set[int], tracked: bool = False, explicit: bool = False
) -> tuple[list[Tensor], Any]:
    """Train with a scaler on the CPU; steps in ``overflow_at`` are extra, and are skipped."""
    model = network()
    optimizer = kind(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
    # A step that is never called leaves its samples to the next, so the batch size is given.
    monitor = track(optimizer, model, batch_size=len(X)) if tracked else None
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for step in range(4):
        for overflow in (True, False) if step in overflow_at else (False,):
            optimizer.zero_grad()
            scale = torch.tensor(float("inf")) if overflow else 1.0
            loss = nn.functional.mse_loss(model(X), Y)
            scaler.scale(loss * scale).backward()
            if explicit:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return weights(model) + buffers, monitor


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("explicit", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("overflow_at", [set(), {0}, {2}, {0, 2}], ids=str)
def test_step_that_a_scaler_skips_never_was(
    fused: bool, explicit: bool, overflow_at: set[int]
) -> None:
    """Catches momentum buffers left unwritten by a skipped first step, as torch 2.13's fused are.

    The scale halves with each overflow, which is exact in binary: the rest must be bit for bit.
    """
    # What uninitialised memory holds is up to the allocator: leave something in it that would tell.
    spoiled = [torch.full(p.shape, float("nan")) for p in network().parameters()]
    del spoiled
    run = scaled_run(stableopt.SGD, fused=fused, explicit=explicit, overflow_at=overflow_at)
    clean = scaled_run(stableopt.SGD, fused=fused, explicit=explicit, overflow_at=set())
    assert same(run[0], clean[0])
    # Torch itself is the oracle wherever it has buffers, or needs none of the kernel's.
    oracle = scaled_run(torch.optim.SGD, fused=fused, explicit=explicit, overflow_at=set())
    assert same(clean[0], oracle[0])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_step_that_a_scaler_skips_is_not_measured(fused: bool) -> None:
    """Catches a measurement of a step that did not happen: fused calls the hooks all the same."""
    run, monitor = scaled_run(stableopt.SGD, fused=fused, overflow_at={0, 2}, tracked=True)
    untracked, _ = scaled_run(stableopt.SGD, fused=fused, overflow_at={0, 2})
    assert same(run, untracked)
    assert len(monitor.history) == 4
    # A fused step that is skipped counts as a step, one that is never called cannot.
    assert [m.step for m in monitor.history] == ([2, 3, 5, 6] if fused else [1, 2, 3, 4])


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
def test_compiled_step(tracked: bool) -> None:
    """Catches a step, or a hook, that the compiler cannot trace or runs at compile time only."""
    model, other = network(), network()
    optimizer = stableopt.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reference = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    monitor = track(optimizer, model, every=2) if tracked else None
    # The eager backend: the graph is what tracing is about, code generation is torch's own.
    step = torch.compile(optimizer.step, backend="eager")
    its_step = torch.compile(reference.step, backend="eager")
    for index in range(5):
        for each, net, go in ((optimizer, model, step), (reference, other, its_step)):
            each.zero_grad()
            backward(net, index)
            go()
        assert same(weights(model), weights(other))
    torch._dynamo.reset()
    if monitor is not None:
        assert [(m.step, m.failure, m.batch_size) for m in monitor.history] == [
            (2, None, 3),
            (4, None, 3),
        ]


HOOKS = """
import itertools, os, sys
import torch
import torch._dynamo  # once here, which each child would do by itself
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
import stableopt

def check(order):
    calls = []
    register_optimizer_step_pre_hook(lambda o, a, k: calls.append("global pre"))
    register_optimizer_step_post_hook(lambda o, a, k: calls.append("global post"))
    optimizers = []
    for kind in order:
        p = nn.Parameter(torch.ones(1))
        optimizer = kind([p], lr=0.5)
        optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre"))
        optimizer.register_step_post_hook(lambda o, a, k: calls.append("post"))
        optimizers.append((optimizer, p))
    for optimizer, p in optimizers:
        p.grad = torch.ones(1)
        calls.clear()
        optimizer.step()
        assert calls == ["global pre", "pre", "post", "global post"], (order, calls)
        assert p.item() == 0.5, (order, p)

# Torch wraps `step` on the first instance of a class, for good: each order needs a fresh process.
for order in itertools.permutations([torch.optim.SGD, stableopt.SGD, stableopt.GD]):
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
    """Catches torch's wrapping of ``step`` done twice, once for a class and once for its base."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all orders"


def test_step_with_a_closure() -> None:
    """Catches a closure that is not called, called twice, called without gradients, or unreturned."""

    def run(kind: Any) -> tuple[list[Tensor], list[Tensor], int]:
        model = network()
        optimizer = kind(model.parameters(), lr=0.05, momentum=0.9)
        if kind is stableopt.SGD:
            track(optimizer, model)
        calls = []

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            return backward(model, len(calls))

        with torch.no_grad():
            losses = [optimizer.step(closure) for _ in range(3)]
        assert calls == [True] * 3
        if kind is stableopt.SGD:
            assert [m.batch_size for m in optimizer.monitor.history] == [3] * 3
        return weights(model), losses, len(calls)

    ours, reference = run(stableopt.SGD), run(torch.optim.SGD)
    assert same(ours[0], reference[0])
    assert same(ours[1], reference[1])


def test_untracked_optimizer_has_no_margins() -> None:
    """Catches properties that fail, or invent numbers, before ``track``."""
    optimizer = stableopt.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert optimizer.monitor is None
    assert optimizer.margins is None
    assert isinstance(optimizer, torch.optim.SGD)
