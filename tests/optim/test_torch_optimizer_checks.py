"""Torch's generic checks of optimizers, on torch's own lists of inputs, for this package's classes.

`optim_db` of ``torch.testing._internal.common_optimizers`` lists constructor arguments and errors of
each optimizer. Every check runs with torch's class too, so that one that torch fails is seen.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_optimizers import INFOS, KINDS, Run, assert_same, common

import stableopt

CASES = [
    pytest.param(kind, case, id=f"{kind.__module__.split('.')[0]}-{kind.__name__}-{case.desc}")
    for kind, base in KINDS.items()
    for case in INFOS[base].optim_inputs_func(device="cpu")
]


def by_file(state: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def goes_on_alike(run: Run, twin: Run) -> None:
    run.go(3)
    twin.go(3)
    assert_same([p.detach() for p in twin.params], [p.detach() for p in run.params])


WAYS: dict[str, Callable[[Any], Any]] = {
    "same": lambda state: state,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "weights_only": lambda state: by_file(state, weights_only=True),
}


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_state_dict_is_deterministic(kind: Any, case: Any) -> None:
    """Catches keys or values that differ after a state dict is loaded."""
    run = Run(kind, case).go(3)
    state = run.optimizer.state_dict()
    for way in WAYS.values():
        twin = Run(kind, case)
        twin.load_weights(run)
        twin.optimizer.load_state_dict(way(state))
        assert_same(twin.optimizer.state_dict(), state)
    goes_on_alike(run, twin)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_state_dict_of_named_parameters(kind: Any, case: Any) -> None:
    """Catches names that are lost, or that keep a state dict without names from loading."""
    named, plain = Run(kind, case, named=True).go(2), Run(kind, case).go(2)
    state = named.optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == ["weight", "bias"]
    plain.optimizer.load_state_dict(copy.deepcopy(state))  # else they share momentum buffers
    named.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    goes_on_alike(named, plain)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_public_attributes_are_copied(kind: Any, case: Any) -> None:
    """Catches attributes that a copy lacks or gains."""
    if kind is torch.optim.LBFGS:
        pytest.skip("torch's own copies lack _params and gain a key of their groups")
    run = Run(kind, case).go(2)

    def public(optimizer: Any) -> set[str]:
        return {name for name in vars(optimizer) if not name.startswith("_")}

    for copied in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        assert public(copied) == public(run.optimizer)
        assert_same(copied.state_dict(), run.optimizer.state_dict())
        assert copied.defaults.keys() == run.optimizer.defaults.keys()
    assert repr(run.optimizer).startswith(kind.__name__)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_hooks_of_steps_and_state_dicts(kind: Any, case: Any) -> None:
    """Catches hooks that do not fire, fire twice, or fire in another order."""
    run, calls = Run(kind, case), []
    optimizer = run.optimizer
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    run.go(1)
    optimizer.load_state_dict(optimizer.state_dict())
    names = ["step pre", "step post", "save pre", "save post", "load pre", "load post"]
    assert calls == names


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_no_gradients_and_zero_gradients_move_nothing(kind: Any, case: Any) -> None:
    """Catches parameters that move, or a step that fails, without a gradient."""
    if case.kwargs.get("weight_decay"):
        pytest.skip("weight decay moves parameters by itself")
    for zero in (False, True):
        run = Run(kind, case)
        before = [p.detach().clone() for p in run.params]
        for p in run.params:
            p.grad = torch.zeros_like(p) if zero else None
        run.optimizer.step(lambda: torch.tensor(1.0))
        assert_same([p.detach() for p in run.params], before)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_the_loss_falls(kind: Any, case: Any) -> None:
    """Catches steps in the wrong direction, and closures without gradients."""
    run = Run(kind, case)
    first = run.closure()
    assert run.optimizer.step(run.closure) == first
    if kind in (torch.optim.LBFGS, stableopt.LBFGS) or case.kwargs.get("lr", 1e-3) < 0.1:
        run.go(20)
        sign = -1 if case.kwargs.get("maximize") else 1
        assert sign * run.closure() <= sign * first


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_arguments_raise(kind: Any) -> None:
    """Catches values that torch refuses and this package takes."""
    info = INFOS[KINDS[kind]]
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        if error.error_on is not common.OptimizerErrorEnum.CONSTRUCTION_ERROR:
            continue
        case = error.optimizer_error_input
        if issubclass(kind, stableopt.LBFGS) and "parameter options" in error.error_regex:
            continue  # groups are allowed here
        with pytest.raises(error.error_type):
            kind(case.params, **case.kwargs)
