"""The joint rule of several optimizers: at its limit, the real optimizers neither grow nor shrink."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stableopt import UpdateRule
from stableopt.stability.rules.preconditioner import DiagonalPreconditioner
from stableopt.stability.rules.several import BlockPreconditioner, rule_of

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

PAIRS: dict[str, tuple[Make, Make]] = {
    "SGD and SGD": (
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.4),
    ),
    "AdamW and SGD, momentum 0.9": (
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
        lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
    ),
    "AdamW of two decays": (
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.3, weight_decay=0.1),
    ),
    "SGD with coupled decay and SGD": (
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=2.0),
        lambda p: torch.optim.SGD(p, lr=0.4),
    ),
}


def hold_adam(optimizers: list[torch.optim.Optimizer]) -> None:
    """Hold second moments and bias corrections of Adam constant."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            if "exp_avg_sq" in state:
                state["exp_avg_sq"].fill_(1.0)
                state["step"].fill_(1e6)


def stepped(
    makers: tuple[Make, Make], hessian: Tensor, steps: int
) -> tuple[UpdateRule, list[float]]:
    """Return the joint rule, and the norm of the parameters after each step on a quadratic.

    Close to its minimum, gradients are too small to change a second moment of 1.
    """
    params = [torch.full((2,), 1e-9, dtype=torch.float64, requires_grad=True) for _ in makers]
    optimizers = [make([p]) for make, p in zip(makers, params, strict=True)]
    norms = []
    for step in range(steps):
        gradient = hessian @ torch.cat(params).detach()
        for p, part in zip(params, gradient.split(2), strict=True):
            p.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
        hold_adam(optimizers)
        if step == 0:  # which Adam takes at full length
            for p in params:
                p.data.fill_(1e-9)
        norms.append(float(torch.cat(params).detach().norm()))
    return UpdateRule.of(optimizers), norms


@pytest.mark.parametrize("name", PAIRS)
def test_the_limit_is_where_the_real_optimizers_diverge(name: str) -> None:
    """Catches rates, dampening or decay of one optimizer that are not scaled to the other's.

    The Hessian couples the two, and is scaled to 0.97 and 1.03 of the limit.
    """
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    shape = root @ root.T
    rule, _ = stepped(PAIRS[name], shape, 2)
    scales = torch.ones(4, dtype=torch.float64)
    if rule.preconditioner is not None:
        scales = rule.preconditioner @ scales
    decays = rule.group_weight_decays or (rule.weight_decay,) * 2
    decay = torch.diag(torch.tensor(decays, dtype=torch.float64).repeat_interleave(2))

    def excess(scale: float) -> float:
        matrix = scales[:, None] * (scale * shape + decay)
        return float(torch.linalg.eigvals(matrix).real.max()) / rule.max_sharpness - 1

    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    for factor, grows in ((0.97, False), (1.03, True)):
        _, norms = stepped(PAIRS[name], low * factor * shape, 600)
        assert (norms[-1] > norms[300]) == grows


def test_blocks_that_are_not_diagonal_are_applied_each_to_its_own() -> None:
    """Catches tensors handed to the wrong block, and a factor that is lost."""
    x, y, z = (torch.zeros(size) for size in (1, 2, 3))
    blocks = [DiagonalPreconditioner([x, y], [2.0, 3.0]), DiagonalPreconditioner([z], [5.0])]
    joint = BlockPreconditioner(blocks, [1.0, 10.0])
    assert (joint @ torch.ones(6)).tolist() == [2, 3, 3, 50, 50, 50]
    assert (joint.over([z, x]) @ torch.ones(4)).tolist() == [50, 50, 50, 2]


def test_filters_and_different_decay_have_no_joint_limit() -> None:
    """Catches the factors of the decay, which are exact for a momentum, with the averages of Adan."""
    kinds = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    params = [torch.ones(1, requires_grad=True) for _ in range(2)]
    for kind, settings, known in (
        (kinds.Adan, ((0.1, 0.5), (0.1, 0.5)), True),
        (kinds.Adan, ((0.1, 0.5), (0.1, 0.1)), False),
        (
            kinds.AdEMAMix,
            ((0.001, 0.3), (0.003, 0.1)),
            True,
        ),  # lr * decay is equal but for rounding
    ):
        optimizers = [
            kind([p], lr=lr, weight_decay=decay, weight_decouple=True)
            for p, (lr, decay) in zip(params, settings, strict=True)
        ]
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.ones(1)
            optimizer.step()
        unknown = UpdateRule.of(optimizers).unknown
        assert unknown is None if known else "filters of the gradients" in str(unknown)


def test_before_a_step_the_joint_preconditioner_is_not_known_yet() -> None:
    """Catches a rule that is called unknown for good where a step will make it known."""
    first_param, second_param = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizers = [torch.optim.Adam([first_param]), torch.optim.AdamW([second_param])]
    assert "has not taken a step" in str(UpdateRule.of(optimizers).unknown)
    for p, optimizer in zip((first_param, second_param), optimizers, strict=True):
        p.grad = torch.ones(1)
        optimizer.step()
    rule = UpdateRule.of(optimizers)
    assert rule.unknown is None
    assert rule.momentum == 0.9
    alike = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in (first_param, second_param)]
    assert UpdateRule.of(alike) == UpdateRule.from_optimizer(alike[0])


GROUPS: dict[str, Callable[[list[dict[str, object]]], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_with_other_momenta_are_blocks_with_limits_of_their_own(name: str) -> None:
    """Catches an error that ends a monitor, also of quantities that need no rule."""
    key, values = (
        ("momentum", (0.9, 0.0)) if name == "SGD" else ("betas", ((0.9, 0.99), (0.8, 0.99)))
    )
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    groups: list[dict[str, object]] = [
        {"params": [p], key: value} for p, value in zip(params, values, strict=True)
    ]
    optimizer = GROUPS[name](groups)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    rule = rule_of([optimizer])
    assert rule.unknown is not None
    assert "the momenta differ" in rule.unknown
    blocks = rule.blocks
    assert [block.name for block in blocks] == [f"{name}, group 0", f"{name}, group 1"]
    for block, p, value in zip(blocks, params, values, strict=True):
        separate = torch.optim.SGD([p], lr=0.1, momentum=value) if name == "SGD" else optimizer
        assert block.params == [p]
        if name == "SGD":
            assert block.rule == UpdateRule.from_optimizer(separate)
        else:
            assert block.rule.momentum == value[0]


def test_settings_without_a_limit_are_a_rule_without_one() -> None:
    """Catches an error of the constructor that ends a monitor; the reason names the setting."""
    rule = rule_of([torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1, momentum=1.0)])
    assert rule.unknown == "momentum=1.0: expected at least 0 and below 1"


@pytest.mark.parametrize("weight_decay", [2.0, 3.0])
def test_a_decay_that_flips_signs_has_no_limit(weight_decay: float) -> None:
    """Catches a division by zero, and a preconditioner with negative entries."""
    params = [torch.ones(1, requires_grad=True) for _ in range(2)]
    decays = (weight_decay, 0.0)
    optimizers = [
        torch.optim.AdamW([p], lr=1.0, weight_decay=decay)
        for p, decay in zip(params, decays, strict=True)
    ]
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones(1)
        optimizer.step()
    reason = rule_of(optimizers).unknown
    assert reason is not None
    assert (
        f"AdamW: decoupled weight decay multiplies the parameters by {1 - weight_decay}" in reason
    )


def test_decay_after_the_preconditioner_joins_like_that_of_groups() -> None:
    """Catches the decay of the optimizer with the largest rate taken for that of all."""
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    params = [torch.ones(1, requires_grad=True) for _ in range(2)]
    groups = [
        {"params": [params[0]], "lr": 0.1, "weight_decay": 0.4},
        {"params": [params[1]], "lr": 0.3, "weight_decay": 0.4},
    ]
    grouped = [schedulefree.AdamWScheduleFree([dict(group) for group in groups])]
    separate = [schedulefree.AdamWScheduleFree([dict(group)]) for group in groups]
    rules = []
    for optimizers in (grouped, separate):
        for optimizer in optimizers:
            optimizer.train()
        for p in params:
            p.grad = torch.ones(1)
        for optimizer in optimizers:
            optimizer.step()
        rules.append(rule_of(optimizers))
    for rule in rules:
        assert rule.group_filtered_decays == pytest.approx((0.4 / 3, 0.4))
        assert rule.max_sharpness == pytest.approx(rules[0].max_sharpness)


def test_rounding_of_computed_settings_does_not_set_groups_apart() -> None:
    """Catches groups that count as different because the weights of schedule-free averages differ
    by one unit in the last place.
    """
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    params = [torch.ones(1, requires_grad=True) for _ in range(2)]
    pairs = list(zip(params, (0.1, 0.3), strict=True))
    grouped = [schedulefree.SGDScheduleFree([{"params": [p], "lr": lr} for p, lr in pairs])]
    separate = [schedulefree.SGDScheduleFree([p], lr=lr) for p, lr in pairs]
    inner = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in pairs])
    wrapped = [schedulefree.ScheduleFreeWrapper(inner)]
    for optimizers in (grouped, separate, wrapped):
        for optimizer in optimizers:
            optimizer.train()
        for _ in range(12):
            for p in params:
                p.grad = torch.ones(1)
            for optimizer in optimizers:
                optimizer.step()
            assert rule_of(optimizers).unknown is None
