"""Models and batches of all kinds are measured correctly or refused with the reason, without a trace."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hostile_models import MEASURED, MSE, REFUSED, Checkpointed, Setting, mlp, pair
from torch import Tensor, nn

import stableopt
from stableopt.curvature import Hessian, Problem
from stableopt.curvature.problem.data.batches import map_tensors, sample_count, tensors_in

STEP = 1e-5
"""Of the reference's central differences, off by some STEP^2 and 1e-16 / STEP in double precision."""


pytestmark = pytest.mark.usefixtures("double_by_default")


def built(name: str) -> Setting:
    torch.manual_seed(0)
    build, _ = {**MEASURED, **REFUSED}[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()


def problem_of(setting: Setting) -> Problem:
    options = dict(setting.options)
    if setting.params is not None:
        options["params"] = setting.params(setting.model)
    make = Problem.from_batch_loss if setting.whole else Problem
    return make(setting.model, setting.loss, setting.data, **options)


@contextlib.contextmanager
def surroundings(setting: Setting) -> Iterator[None]:
    """Enter the user's context and ignore warnings, which have tests of their own."""
    with warnings.catch_warnings(), setting.around():
        warnings.simplefilter("ignore")
        yield


def measured(problem: Problem, max_iter: int = 200) -> stableopt.StabilityMargins:
    """Measure as a user would."""
    return stableopt.measure(
        problem, lr=0.1, quantities=("sharpness",), tol=1e-3, max_iter=max_iter, seed=1
    )


# -- measured ----------------------------------------------------------------------------------------


def differenced(setting: Setting, directions: Tensor) -> Tensor:
    """Return the products of the Hessian with unit ``directions``, by differences of ``backward()``.

    The model itself is called, in eval mode, and its parameters are written to.
    """
    if setting.options.get("dtype") is not None:
        setting.model.double()
    loss_modules = setting.loss.modules() if isinstance(setting.loss, nn.Module) else ()
    statistics = bool(setting.options.get("batch_statistics"))
    for module in (*setting.model.modules(), *loss_modules):
        module.training = statistics
    chosen = setting.params(setting.model) if setting.params else setting.model.parameters()
    counting = {id(p) for p in chosen if p.requires_grad}
    params = [p for p in setting.model.parameters() if id(p) in counting]
    batches = [map_tensors(in_double, batch) for batch in setting.read()]
    n = sum(sample_count(batch) for batch in batches)
    start = [p.detach().clone() for p in params]

    def gradient(step: Tensor) -> Tensor:
        parts = torch.split(step, [p.numel() for p in params])
        for p, value, part in zip(params, start, parts, strict=True):
            p.grad = None
            p.data.copy_(value + part.view_as(value))
        for batch in batches:
            (setting.batch_loss(batch) * sample_count(batch) / n).backward()
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in params]
        return torch.cat([slope.reshape(-1) for slope in slopes])

    pairs = [(gradient(STEP * v), gradient(-STEP * v)) for v in directions]
    return torch.stack([(ahead - behind) / (2 * STEP) for ahead, behind in pairs])


def in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", MEASURED)
def test_is_measured(name: str) -> None:
    """Catches curvature of something other than the model that trains: of a compiled graph, recomputed
    activations, half precision, a mode in which dropout draws; and products that lack a part.

    Random directions see every entry of the matrix. 1e-5: differences are good to 1e-6, the
    reference's to 1e-8. 1e-4: the eigen-solver's residual of 1e-3 enters the value squared, over the
    gap between the eigenvalues.
    """
    setting = built(name)
    with surroundings(setting):
        problem = problem_of(setting)
        margins = measured(problem)
        matrix = Hessian(problem) @ torch.eye(problem.num_params)
    assert margins.failure is None
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(3, problem.num_params, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a compiler that sees a warning as an error
        expected = differenced(built(name), directions)
    torch.testing.assert_close(
        directions @ matrix, expected, rtol=0, atol=1e-5 * float(expected.norm())
    )
    largest = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])
    assert margins.sharpness == pytest.approx(largest, rel=1e-4)
    assert margins.method == MEASURED[name][1]
    assert margins.converged


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    """Catches a number for what has no curvature, and a reason that does not say what is wrong."""
    setting = built(name)
    try:
        with surroundings(setting):
            reason = measured(problem_of(setting)).failure
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    assert reason is not None
    assert re.search(REFUSED[name][1], reason), reason


def test_the_set_is_large_enough() -> None:
    """Catches entries that share a name, and a set that was cut."""
    assert len(MEASURED) + len(REFUSED) >= 80


# -- without a trace -----------------------------------------------------------------------------------


def contents(value: Any) -> Any:
    """Return what a value holds, in a form that can be compared."""
    if isinstance(value, Tensor):
        if value.device.type == "meta" or isinstance(value, nn.UninitializedParameter):
            return "no values"
        dense_value = value.detach().to_dense() if value.is_sparse else value.detach()
        return (id(value), value.requires_grad, dense_value.clone())
    if isinstance(value, dict):
        return [(key, contents(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)) or hasattr(value, "appendleft"):
        return [contents(item) for item in value]
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    return id(value)


def traces(setting: Setting) -> list[Any]:
    """Return everything that a measurement might change."""
    modules = [m for m in (setting.model, setting.loss) if isinstance(m, nn.Module)]
    attributes = [contents(m.__dict__) for module in modules for m in module.modules()]
    grads = [contents(p.grad) for module in modules for p in module.parameters()]
    numpy_state = np.random.get_state()  # noqa: NPY002
    switches = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.set_autocast_enabled,
        torch.utils.checkpoint.CheckpointFunction,
        torch.utils.checkpoint._checkpoint_without_reentrant_generator,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cudnn.enabled,
        repr(torch._dynamo.eval_frame._stance),
        len(torch.nn.modules.module._global_forward_hooks),
    )
    generators = (torch.get_rng_state(), repr(random.getstate()), numpy_state[1].tolist())
    return [attributes, grads, switches, generators, numpy_state[2:], data_of(setting)]


def data_of(setting: Setting) -> Any:
    tensors = [] if hasattr(setting.data, "sampler") else list(tensors_in(setting.data))
    return [contents(t) for t in (*tensors, *tensors_in(setting.batches))]


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        # NaN counts as equal to NaN.
        return torch.equal(left.nan_to_num(), right.nan_to_num()) and left.shape == right.shape
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


@pytest.mark.parametrize("name", [*MEASURED, *REFUSED])
def test_nothing_is_left_behind(name: str) -> None:
    """Catches gradients, buffers, modes, hooks, attributes, lists, random states, data, or switches of
    torch that a measurement, or one that is refused halfway, leaves changed.
    """
    setting = built(name)
    if isinstance(setting.model, nn.Module):
        for index, p in enumerate(setting.model.parameters()):
            if index % 2 and p.device.type != "meta" and name != "lazy layers":
                p.grad = torch.ones_like(p)
    torch.manual_seed(4)
    before = traces(setting)
    try:
        with surroundings(setting):
            measured(problem_of(setting), max_iter=3)
    except Exception:
        assert name in REFUSED
    after = traces(setting)
    for kind, old, new in zip(
        ("attributes", "gradients", "switches", "generators", "numpy", "data"),
        before,
        after,
        strict=True,
    ):
        assert equal(old, new), kind


# -- threads -------------------------------------------------------------------------------------


def test_another_thread_trains_as_before() -> None:
    """Catches process-wide switches that reach another thread while it trains: its activations
    would not be recomputed, or its autocast would be off.
    """
    model, calls, autocast_on = Checkpointed(reentrant=False), [], []
    model.inner.register_forward_hook(lambda *_: calls.append(1))
    waiting, trained = threading.Event(), threading.Event()

    def training() -> None:
        waiting.wait(timeout=10)
        model(torch.randn(3, 3, dtype=torch.float64)).sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast_on.append(torch.is_autocast_enabled("cpu"))
        trained.set()

    thread = threading.Thread(target=training)
    thread.start()
    with Problem(mlp(), MSE, pair()).evaluation():
        waiting.set()
        assert trained.wait(timeout=10)
    thread.join(timeout=10)
    assert len(calls) == 4  # two blocks, each called and recomputed
    assert autocast_on == [True]
