"""Torch's generic checks of gradients, rates and groups, on torch's own lists of inputs.

With ``test_torch_optimizer_checks.py`` this covers what torch's ``TestOptimRenewed`` checks on a CPU.
Every check runs with torch's class too, so that one that torch fails is seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_optimizers import INFOS, KINDS, Run, assert_same, common

import stableopt

Closure = Callable[[], Any]


def cases(
    *, implementations: bool = False, only: Callable[[Any], bool] = lambda info: True
) -> list[Any]:
    """Return each class with each of torch's inputs; if asked for, foreach and fused ones too."""
    parameters = []
    for kind, base in KINDS.items():
        info = INFOS[base]
        if not only(info):
            continue
        inputs = info.optim_inputs_func(device="cpu")
        if implementations:
            inputs = common._get_optim_inputs_including_global_cliquey_kwargs(
                "cpu", torch.float32, info, skip=("differentiable",)
            )
        name = f"{kind.__module__.split('.')[0]}-{kind.__name__}"
        parameters += [pytest.param(kind, case, id=f"{name}-{case.desc}") for case in inputs]
    return parameters


def by_gradients(info: Any) -> bool:
    return not info.step_requires_closure


def stepped(optimizer: Any, closure: Closure) -> Any:
    """Take a step as each class documents it."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(closure)
    loss = closure()
    optimizer.step()
    return loss


def least_squares(weight: Tensor, bias: Tensor, optimizer: Any) -> Closure:
    x = torch.linspace(-1, 1, weight.shape[1])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss.detach()

    return closure


def layer(*, contiguous: bool = True) -> list[nn.Parameter]:
    torch.manual_seed(3)
    wide = torch.randn(10, 5, 2), torch.randn(10, 2)
    return [nn.Parameter(w[..., 0].clone() if contiguous else w[..., 0]) for w in wide]


def rises(case: Any) -> bool:
    return bool(case.kwargs.get("maximize"))


@pytest.mark.parametrize(("kind", "case"), cases(implementations=True))
@pytest.mark.parametrize("contiguous", [True, False])
def test_parameters_in_any_order_of_memory(kind: Any, case: Any, contiguous: bool) -> None:
    """Catches kernels that assume contiguous parameters, and fused ones that step differently."""
    params = layer(contiguous=contiguous)
    optimizer = kind(params, **copy.deepcopy(case.kwargs))
    closure = least_squares(*params, optimizer)
    first = closure()
    for _ in range(20):
        stepped(optimizer, closure)
    assert closure() > first if rises(case) else closure() < first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_scheduler_of_torchs_list(kind: Any, groups: int) -> None:
    """Catches rates that a scheduler cannot set, alone or in groups."""
    if kind is torch.optim.LBFGS and groups == 2:
        pytest.skip("torch's own takes one group")
    for makers in INFOS[KINDS[kind]].scheduler_inputs:
        weight, bias = layer()
        params = (
            [weight, bias]
            if groups == 1
            else [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
        )
        optimizer = kind(params, lr=0.01)
        schedulers = [make(optimizer) for make in makers]
        closure = least_squares(weight, bias, optimizer)
        first = closure()
        for _ in range(20):
            loss = stepped(optimizer, closure)
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([loss] if plateau else []))
        assert closure() < first


@pytest.mark.parametrize(("kind", "case"), cases(implementations=True))
def test_a_rate_in_a_tensor_is_the_same_rate(kind: Any, case: Any) -> None:
    """Catches a rate that is cast, or copied when the step is built."""
    lr = 1.0 if kind in (torch.optim.LBFGS, stableopt.LBFGS) else 1e-3
    ends = []
    for rate in (lr, torch.tensor(lr)):
        params = layer()
        optimizer = kind(params, **{**copy.deepcopy(case.kwargs), "lr": rate})
        for _ in range(5):
            stepped(optimizer, least_squares(*params, optimizer))
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(("kind", "case"), cases(only=lambda info: info.supports_sparse))
def test_sparse_gradients_are_dense_ones(kind: Any, case: Any) -> None:
    """Catches gradients whose repeated entries are not summed."""
    kwargs = {**copy.deepcopy(case.kwargs), **INFOS[KINDS[kind]].metadata_for_sparse[0]}
    ends = []
    for sparse in (True, False):
        p = nn.Parameter(torch.tensor([1.5, 1.5], dtype=torch.float64))
        optimizer = kind([p], **{**kwargs, "dampening": 0})
        for step in range(40):
            index, slope = step % 2, 2 * p.detach()[step % 2]
            # Uncoalesced: the entry is there twice.
            grad = torch.sparse_coo_tensor(
                [[index, index]],
                torch.stack([slope / 4, slope - slope / 4]),
                (2,),
                check_invariants=True,
            )
            p.grad = grad if sparse else grad.to_dense()
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)
    assert float(ends[0].norm()) < 1.5 * math.sqrt(2)


@pytest.mark.filterwarnings("ignore:the closure returned different losses")
@pytest.mark.parametrize(("kind", "case"), cases(only=lambda info: info.supports_complex))
def test_complex_parameters_are_pairs_of_real_ones(kind: Any, case: Any) -> None:
    """Catches squares without conjugates, at every point of a line search, with a real one too."""
    generator = torch.Generator().manual_seed(1)
    wave = torch.randn(4, 3, generator=generator, dtype=torch.complex64)
    real = torch.randn(4, 3, generator=generator)
    visited: dict[bool, list[Tensor]] = {}
    for as_complex in (True, False):
        first = wave.clone() if as_complex else torch.view_as_real(wave).clone()
        params = [nn.Parameter(first), nn.Parameter(real.clone())]
        optimizer = kind(params, **copy.deepcopy(case.kwargs))
        noise = torch.Generator().manual_seed(2)
        points = visited[as_complex] = []

        def closure(params: Any = params, points: Any = points, noise: Any = noise) -> Tensor:
            for p in params:
                view = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
                points.append(view.clone())
                grad = torch.randn(view.shape, generator=noise)
                p.grad = torch.view_as_complex(grad) if p.is_complex() else grad
            return torch.randn((), generator=noise)

        for _ in range(3):
            stepped(optimizer, closure)
    # Complex products may be fused: rounding of single precision, as torch allows.
    torch.testing.assert_close(visited[True], visited[False])


@pytest.mark.parametrize(("kind", "case"), cases(only=by_gradients))
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_implementations_agree(kind: Any, case: Any, flag: str) -> None:
    """Catches a path that skips frozen layers, missing gradients or parameters without dimensions."""
    ends = []
    for value in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1)).double()
        scalar = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        scalar.grad = torch.tensor(0.25, dtype=torch.float64)
        params = [*model.parameters(), scalar]
        optimizer = kind(params, **{**copy.deepcopy(case.kwargs), flag: value})
        for step in range(7):
            optimizer.zero_grad()
            if step in (3, 5):
                model[2].requires_grad_(step == 5)
            if step != 2:
                model(torch.linspace(0.1, 0.6, 6, dtype=torch.float64).view(3, 2)).sum().backward()
            optimizer.step()
        buffers = [optimizer.state[p].get("momentum_buffer") for p in params]
        ends.append([p.detach() for p in params] + [b for b in buffers if b is not None])
    # Fused kernels multiply and add at once: seven steps of rounding.
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "case"), cases(implementations=True, only=by_gradients))
def test_groups_have_their_own_options(kind: Any, case: Any) -> None:
    """Catches a rate or a decay of one group that is applied to another."""
    kwargs = {"lr": 1e-3, **copy.deepcopy(case.kwargs)}
    weight, bias = layer()
    still = nn.Parameter(torch.ones(2))
    groups = [
        {"params": [weight], **kwargs},
        {"params": [bias], **kwargs, "weight_decay": 0.0},
        {"params": [still]},
    ]
    optimizer = kind(groups, lr=1e-28)
    closure = least_squares(weight, bias, optimizer)
    first = closure()
    for _ in range(20):
        closure()
        still.grad = torch.ones(2)
        optimizer.step()
    assert closure() > first if rises(case) else closure() < first
    assert_same(still.detach(), torch.ones(2))


@pytest.mark.parametrize(("kind", "case"), cases(implementations=True))
def test_older_state_dicts_load(kind: Any, case: Any) -> None:
    """Catches a step that needs options which a checkpoint of an older torch lacks."""
    run = Run(kind, case, named=True).go(3)
    state = copy.deepcopy(run.optimizer.state_dict())
    for group in state["param_groups"]:
        for name in INFOS[KINDS[kind]].not_og_supported_flags:
            group.pop(name, None)
    run.optimizer.load_state_dict(state)
    run.go(1)
    assert all(len(state) for state in run.optimizer.state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_change_what_is_loaded_and_saved(kind: Any) -> None:
    """Catches hooks whose result is dropped, or that run in another order than they ask for."""
    p = nn.Parameter(torch.ones(2))
    optimizer = kind([p], lr=1.0)

    def rate(value: float) -> Callable[..., Any]:
        def hook(optimizer: Any, state: Any) -> Any:
            state = copy.deepcopy(state)
            state["param_groups"][0]["lr"] = value
            return state

        return hook

    optimizer.register_load_state_dict_pre_hook(rate(0.002))
    optimizer.register_load_state_dict_pre_hook(rate(0.003), prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.state.update(test=1))
    optimizer.register_state_dict_post_hook(
        lambda optimizer, state: {"seen": state["state"]["test"]}
    )
    assert optimizer.state_dict() == {"seen": 1}


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, stableopt.LBFGS])
def test_steps_return_one_type(kind: Any) -> None:
    """Catches a number where a step ends at once, and a tensor elsewhere."""
    kinds = set()
    for tolerance in (math.inf, -math.inf):
        optimizer = kind([torch.ones(3)], tolerance_grad=tolerance)
        kinds.add(type(optimizer.step(lambda: torch.tensor([10.0]))))
    assert kinds == {Tensor}


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_torchs(kind: Any) -> None:
    """Catches messages that code written for torch does not recognise."""
    info = INFOS[KINDS[kind]]
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        case = error.optimizer_error_input
        expects = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expects(error.error_type, match=error.error_regex):
            kind(case.params, **case.kwargs)
