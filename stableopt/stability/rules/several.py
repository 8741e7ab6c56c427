r"""The update rule of several optimizers that train one model together.

Optimizers that share a model, such as Muon and AdamW, take one step together. Let b number them. If
their momenta agree, the step is that of one optimizer with the preconditioner
:math:`P = \mathrm{diag}(\eta_b P_b)/\eta`. Heavy balls agree for any dampening :math:`\tau_b`, since
only :math:`\eta_b(1-\tau_b)` enters. Otherwise each block has a limit of its own, and the step as a
whole has none: :class:`SeparateBlocks`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from stableopt.stability.rules.filters import SAME
from stableopt.stability.rules.norms import NormedStep
from stableopt.stability.rules.preconditioner import (
    DiagonalPreconditioner,
    StepPreconditioner,
    UnknownPreconditioner,
    UnknownStep,
)
from stableopt.stability.rules.update_rule import UpdateRule, base_optimizer

__all__ = [
    "Block",
    "BlockPreconditioner",
    "SeparateBlocks",
    "optimizers_in",
    "rule_of",
]


_MAY_DIFFER = {
    "lr",
    "maximize",
    "full_batch",
    "weight_decay",
    "group_lrs",
    "group_weight_decays",
    "decoupled_weight_decay",
    "preconditioner",
}
"""What one preconditioner takes in, or is checked on its own."""


@dataclass(frozen=True)
class Block:
    """One of several optimizers: its rule, and the parameters that it updates.

    Attributes:
        name: its class, with a number from the second one of a class on.
        optimizer: the optimizer.
        rule: its rule.
    """

    name: str
    optimizer: torch.optim.Optimizer
    rule: UpdateRule

    @property
    def params(self) -> list[Tensor]:
        """The parameters, in the order of the groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class SeparateBlocks(UnknownStep):
    """The placeholder of a joint preconditioner for optimizers whose momenta differ.

    Args:
        reason: why there is none.
        blocks: the optimizers, each with its own rule.
    """

    def __init__(self, reason: str, blocks: Sequence[Block]) -> None:
        super().__init__(reason)
        self.blocks = tuple(blocks)


class BlockPreconditioner(StepPreconditioner):
    """A block-diagonal P.

    Args:
        blocks: a preconditioner for each block, over its own parameters.
        factors: a factor for each.

    >>> one, other = (DiagonalPreconditioner([torch.zeros(n)], [1.0]) for n in (1, 2))
    >>> BlockPreconditioner([one, other], [2.0, 3.0]) @ torch.ones(3)
    tensor([2., 3., 3.])
    """

    def __init__(self, blocks: Iterable[StepPreconditioner], factors: Iterable[float]) -> None:
        self._blocks, self._factors = tuple(blocks), tuple(factors)
        super().__init__(p for block in self._blocks for p in block.params)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Apply each block to its own tensors."""
        left = iter(tensors)
        image: list[Tensor] = []
        for block, factor in zip(self._blocks, self._factors, strict=True):
            own = block.apply(list(itertools.islice(left, len(block.params))))
            image += [factor * tensor for tensor in own]
        return image


def optimizers_in(given: Any) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of ``given``, one or a sequence of them, without their wrappers.

    Raises:
        TypeError: for anything else, or none.
        ValueError: for an optimizer that is given twice, or a parameter that two of them hold.
    """
    several = isinstance(given, (list, tuple))
    optimizers = tuple(given) if several else (given,)
    # Wrappers such as schedulefree's are not optimizers themselves, but have groups and steps.
    if not optimizers or not all(hasattr(o, "param_groups") for o in optimizers):
        raise TypeError(f"optimizer={given!r}: expected a torch.optim.Optimizer, or a list of them")
    optimizers = tuple(base_optimizer(optimizer) for optimizer in optimizers)
    held = Counter(
        key
        for optimizer in optimizers
        for key in {id(p) for group in optimizer.param_groups for p in group["params"]}
    )
    if twice := sum(count > 1 for count in held.values()):
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ValueError(
            f"optimizer=[{names}]: {twice} parameters are held by more than one of them: expected"
            " each parameter in one optimizer, and each optimizer once"
        )
    return optimizers


def rule_of(optimizers: Sequence[torch.optim.Optimizer]) -> UpdateRule:
    """Return the rule of one optimizer, or the joint rule of several.

    Raises:
        TypeError: as ``UpdateRule.from_optimizer`` does.
    """
    if len(optimizers) == 1:
        return _read(optimizers[0])
    blocks, seen = [], Counter[str]()
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        seen[kind] += 1
        name = kind if seen[kind] == 1 else f"{kind}{seen[kind]}"
        blocks.append(Block(name, optimizer, _read(optimizer)))
    return _joint(blocks)


def _read(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Return the rule; where groups differ in their momentum, that of optimizers of one group each.

    What has no rule, such as a momentum of 1, is a rule without limits: a monitor that was made must
    not end the training when groups or steps begin to differ.
    """
    try:
        return UpdateRule.from_optimizer(optimizer)
    except ValueError as error:
        unknown = UpdateRule.unknown_step(optimizer, str(error))
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    try:
        blocks = [
            Block(f"{kind}, group {index}", part, UpdateRule.from_optimizer(part))
            for index, part in enumerate(_of_one_group(optimizer, group) for group in groups)
        ]
        return _joint(blocks) if len(blocks) > 1 else unknown
    except ValueError:
        return unknown


def _of_one_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer for reading, with one group and the state of ``optimizer``."""
    part = object.__new__(type(optimizer))
    vars(part).update({**vars(optimizer), "param_groups": [group]})
    return part


def _joint(blocks: Sequence[Block]) -> UpdateRule:
    """Return one rule for all blocks, if their momenta agree."""
    rules = [block.rule for block in blocks]
    if len({rule.maximize for rule in rules}) > 1:
        raise ValueError("optimizer: some of them maximize: expected all of them to, or none")
    fastest = max(rules, key=lambda rule: rule.lr)
    common: dict[str, Any] = {
        "lr": fastest.lr,
        "maximize": fastest.maximize,
        "full_batch": all(rule.full_batch for rule in rules),
    }
    apart = _apart(blocks)
    if apart is not None:
        return UpdateRule(**common, preconditioner=SeparateBlocks(apart, blocks))
    reasons = [rule.unknown for rule in rules if rule.unknown is not None]
    if all(rule == rules[0] and not rule.preconditioned for rule in rules):
        return rules[0]
    shrinks = [rule.lr * rule.decoupled_weight_decay for rule in rules]
    same = len(set(shrinks)) == 1
    decays = tuple(decay for block in blocks for decay in _decays(block))
    shared = len(set(decays)) == 1
    preconditioner: StepPreconditioner
    if reasons:
        diagonal = all(rule.diagonal for rule in rules)
        preconditioner = UnknownPreconditioner(reasons[0], diagonal=diagonal)
    else:
        factors = [_speed(rule) / _speed(fastest) if _speed(fastest) else 1.0 for rule in rules]
        if not same:
            # As in diagonal_rule: decay that differs becomes a part of the preconditioner.
            factors = [f * 2 / (2 - shrink) for f, shrink in zip(factors, shrinks, strict=True)]
        preconditioner = _together([_own(block) for block in blocks], factors)
    return replace(
        fastest,
        **common,
        group_lrs=(),
        weight_decay=decays[0] if shared else 0.0,
        group_weight_decays=() if shared else decays,
        decoupled_weight_decay=shrinks[0] / fastest.lr if same and fastest.lr else 0.0,
        preconditioner=preconditioner,
    )


def _apart(blocks: Sequence[Block]) -> str | None:
    """Return why the blocks have no common limit, or ``None`` if they have one."""
    for block in blocks:
        p = block.rule.preconditioner
        if isinstance(p, UnknownStep):
            reason = f"no limit is known for all parameters together: {p.reason}"
            if not isinstance(p, NormedStep):
                return reason
            return (
                f"{reason} of its parameters alone, with a monitor of {block.name} and params=, or"
                " realised_edge with this one"
            )
    first, *rest = (_form(block.rule) for block in blocks)
    if not all(_agree(first, other) for other in rest):
        momenta = "; ".join(f"{b.name}: {b.rule.memory:g}" for b in blocks)
        return f"the momenta differ ({momenta}), so each has a limit of its own"
    return None


def _form(rule: UpdateRule) -> tuple[Any, ...]:
    """Return what must agree for blocks to have a common limit."""
    heavy_ball = not rule.nesterov and rule.momentum_share == 1
    apart = _MAY_DIFFER | ({"dampening"} if heavy_ball else set())
    return tuple(getattr(rule, field.name) for field in fields(rule) if field.name not in apart)


def _agree(one: Any, other: Any) -> bool:
    """Whether settings are the same, up to the rounding errors of those computed at each step."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_agree, one, other))
    floats = isinstance(one, float) and isinstance(other, float)
    return bool(one == other or (floats and abs(one - other) <= SAME))


def _speed(rule: UpdateRule) -> float:
    return rule.lr * (1 - rule.dampening if rule.momentum else 1.0)


def _own(block: Block) -> StepPreconditioner:
    """Return the preconditioner of a block over its parameters, with the rates of its groups."""
    rule = block.rule
    if rule.preconditioner is not None:
        return rule.preconditioner.over(block.params)
    lrs = rule.group_lrs or (rule.lr,) * len(block.optimizer.param_groups)
    entries = [
        lr / rule.lr if rule.lr else 1.0
        for lr, group in zip(lrs, block.optimizer.param_groups, strict=True)
        for _ in group["params"]
    ]
    return DiagonalPreconditioner(block.params, entries)


def _decays(block: Block) -> tuple[float, ...]:
    """Return the coupled weight decay of each group."""
    rule = block.rule
    return rule.group_weight_decays or (rule.weight_decay,) * len(block.optimizer.param_groups)


def _together(own: Sequence[StepPreconditioner], factors: Sequence[float]) -> StepPreconditioner:
    if not all(isinstance(p, DiagonalPreconditioner) for p in own):
        return BlockPreconditioner(own, factors)
    entries = [
        entry * factor
        for p, factor in zip(own, factors, strict=True)
        if isinstance(p, DiagonalPreconditioner)
        for entry in p.entries
    ]
    return DiagonalPreconditioner([param for p in own for param in p.params], entries)
