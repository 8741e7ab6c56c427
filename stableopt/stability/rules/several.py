r"""`rule_of`: the joint update rule of several optimizers that train one model.

Optimizers that share a model, such as Muon and AdamW, take one step together. Let b number them. If
their momenta agree, the step is that of one optimizer with the preconditioner
:math:`P = \mathrm{diag}(\eta_b P_b)/\eta`. Heavy balls agree for any dampening :math:`\tau_b`, since
only :math:`\eta_b(1-\tau_b)` matters. Otherwise each optimizer's block of parameters has its own limit,
and the joint step has none (:class:`SeparateBlocks`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import shown
from stableopt.stability.rules.filters import agree, no_lookahead_edge
from stableopt.stability.rules.preconditioner import (
    DiagonalPreconditioner,
    StepPreconditioner,
    UnknownPreconditioner,
    UnknownStep,
    decay_factor,
)
from stableopt.stability.rules.reader_registry import base_optimizer
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = [
    "BlockPreconditioner",
    "OptimizerBlock",
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
    "filtered_weight_decay",
    "group_filtered_decays",
    "decoupled_weight_decay",
    "preconditioner",
}
"""Fields that a joint preconditioner absorbs, or that have their own check."""


@dataclass(frozen=True)
class OptimizerBlock:
    """One of several optimizers: its rule, and the parameters that it updates.

    Attributes:
        name: the name of its class; the second optimizer of a class has the suffix 2, and so on.
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
    """The placeholder of a joint preconditioner for optimizers without a joint limit.

    Args:
        reason: why they have no joint limit.
        blocks: the optimizers, each with its own rule.
    """

    def __init__(self, reason: str, blocks: Sequence[OptimizerBlock]) -> None:
        super().__init__(reason)
        self.blocks = tuple(blocks)


class BlockPreconditioner(StepPreconditioner):
    """A block-diagonal P.

    Args:
        blocks: a preconditioner for each block, over its own parameters.
        factors: a factor for each block.

    >>> first, second = (DiagonalPreconditioner([torch.zeros(n)], [1.0]) for n in (1, 2))
    >>> BlockPreconditioner([first, second], [2.0, 3.0]) @ torch.ones(3)
    tensor([2., 3., 3.])
    """

    def __init__(self, blocks: Iterable[StepPreconditioner], factors: Iterable[float]) -> None:
        self._blocks, self._factors = tuple(blocks), tuple(factors)
        super().__init__(p for block in self._blocks for p in block.params)
        self.by_parameter = all(block.by_parameter for block in self._blocks)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Apply each block to its own tensors."""
        remaining = iter(tensors)
        image: list[Tensor] = []
        for block, factor in zip(self._blocks, self._factors, strict=True):
            part = block.apply(list(itertools.islice(remaining, len(block.params))))
            image += [factor * tensor for tensor in part]
        return image


def optimizers_in(given: Any) -> tuple[torch.optim.Optimizer, ...]:
    """Return ``given``, an optimizer or a list of them, as a tuple of optimizers without wrappers.

    Raises:
        TypeError: for anything else, or an empty list.
        ValueError: for a parameter that two of them hold, as in an optimizer that is given twice.
    """
    optimizers = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    # Wrappers such as schedulefree's are not optimizers, but have groups and steps.
    fits = (hasattr(o, "param_groups") and not isinstance(o, type) for o in optimizers)
    if not optimizers or not all(fits):
        raise TypeError(
            f"optimizer={shown(given)}: expected a torch.optim.Optimizer, or a list of them"
        )
    optimizers = tuple(base_optimizer(optimizer) for optimizer in optimizers)
    holders: Counter[int] = Counter()
    for optimizer in optimizers:
        holders.update({id(p) for group in optimizer.param_groups for p in group["params"]})
    shared = sum(count > 1 for count in holders.values())
    if shared:
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ValueError(
            f"optimizer=[{names}]: {shared} parameters are held by more than one of them: expected"
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
    blocks: list[OptimizerBlock] = []
    counts: Counter[str] = Counter()
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        counts[kind] += 1
        name = kind if counts[kind] == 1 else f"{kind}{counts[kind]}"
        blocks.append(OptimizerBlock(name, optimizer, _read(optimizer)))
    return _joint_rule(blocks)


def _read(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Return the rule of an optimizer; if its groups' momenta differ, the joint rule of its groups.

    An optimizer without a rule, for instance with a momentum of 1, has a rule without limits: an error
    would end the training when groups begin to differ under a monitor.
    """
    try:
        return UpdateRule.from_optimizer(optimizer)
    except ValueError as error:
        unknown = UpdateRule.unknown_step(optimizer, str(error))
    kind = type(optimizer).__name__
    groups = [_with_one_group(optimizer, group) for group in optimizer.param_groups]
    if len(groups) < 2:
        return unknown
    try:
        return _joint_rule(
            [
                OptimizerBlock(f"{kind}, group {index}", group, UpdateRule.from_optimizer(group))
                for index, group in enumerate(groups)
            ]
        )
    except ValueError:
        return unknown


def _with_one_group(
    optimizer: torch.optim.Optimizer, group: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return a read-only copy of ``optimizer`` with one group and the same state."""
    part = object.__new__(type(optimizer))
    vars(part).update({**vars(optimizer), "param_groups": [group]})
    return part


def _joint_rule(blocks: Sequence[OptimizerBlock]) -> UpdateRule:
    """Return one rule for all blocks, without limits if the blocks have no joint limit."""
    rules = [block.rule for block in blocks]
    if len({rule.maximize for rule in rules}) > 1:
        raise ValueError("optimizer: some of them maximize: expected all of them to, or none")
    fastest = max(rules, key=lambda rule: rule.lr)
    common: dict[str, Any] = {
        "lr": fastest.lr,
        "maximize": fastest.maximize,
        "full_batch": all(rule.full_batch for rule in rules),
    }
    no_limit = _no_joint_limit(blocks)
    if no_limit is not None:
        return UpdateRule(**common, preconditioner=SeparateBlocks(no_limit, blocks))
    if all(rule == rules[0] and not rule.preconditioned for rule in rules):
        return rules[0]
    shrinks = [rule.lr * rule.decoupled_weight_decay for rule in rules]
    same_shrink = agree(min(shrinks), max(shrinks))
    decays = tuple(decay for block in blocks for decay in _group_decays(block))
    same_decay = len(set(decays)) == 1
    reasons = [rule.unknown for rule in rules if rule.unknown is not None]
    top_speed = _speed(fastest)
    factors = [_speed(rule) / top_speed if top_speed else 1.0 for rule in rules]
    filtered = tuple(
        factor * decay
        for block, factor in zip(blocks, factors, strict=True)
        for decay in _filtered_decays(block)
    )
    same_filtered = len(set(filtered)) == 1
    preconditioner: StepPreconditioner
    if reasons:
        diagonal = all(rule.diagonal for rule in rules)
        preconditioner = UnknownPreconditioner(reasons[0], diagonal=diagonal)
    else:
        if not same_shrink:
            # As in stepped_rule: decay that differs becomes a part of the preconditioner.
            factors = [f * decay_factor(s) for f, s in zip(factors, shrinks, strict=True)]
        preconditioner = _block_diagonal([_block_preconditioner(b) for b in blocks], factors)
    return replace(
        fastest,
        **common,
        group_lrs=(),
        weight_decay=decays[0] if same_decay else 0.0,
        group_weight_decays=() if same_decay else decays,
        filtered_weight_decay=filtered[0] if same_filtered else 0.0,
        group_filtered_decays=() if same_filtered else filtered,
        decoupled_weight_decay=shrinks[0] / fastest.lr if same_shrink and fastest.lr else 0.0,
        preconditioner=preconditioner,
    )


def _no_joint_limit(blocks: Sequence[OptimizerBlock]) -> str | None:
    """Return why the blocks have no joint limit, or ``None`` if they have one."""
    for block in blocks:
        if not block.rule.has_limit:
            reason = f"no limit is known for all parameters together: {block.rule.unknown}"
            if block.rule.norm is None:
                return reason
            return (
                f"{reason} of its parameters alone, with a second monitor of {block.name} and params=,"
                " or realised_edge with this monitor"
            )
    first, *others = (_momentum_settings(block.rule) for block in blocks)
    if not all(agree(first, other) for other in others):
        momenta = "; ".join(f"{b.name}: {b.rule.memory:g}" for b in blocks)
        return f"the momenta differ ({momenta}), so each has its own limit"
    decays_after = any(decay for block in blocks for decay in _filtered_decays(block))
    if decays_after and not all(block.rule.diagonal for block in blocks):
        return "no limit is known for weight decay after a preconditioner that is not diagonal"
    shrinks = [block.rule.lr * block.rule.decoupled_weight_decay for block in blocks]
    if not agree(min(shrinks), max(shrinks)):  # equal ones enter the joint limit
        for block, shrink in zip(blocks, shrinks, strict=True):
            try:
                decay_factor(shrink)
            except ValueError as error:
                return f"{block.name}: {error}"
        # As in stepped_rule, the factors of different decay are exact for a momentum only.
        if any(block.rule.filter is not None for block in blocks):
            return "no limit is known for filters of the gradients and different decoupled weight decay"
        if any(block.rule.lookahead is not None for block in blocks):
            return no_lookahead_edge(max(shrinks))
    return None


def _momentum_settings(rule: UpdateRule) -> tuple[Any, ...]:
    """Return the settings that must agree for blocks to have a joint limit."""
    heavy_ball = not rule.nesterov and rule.momentum_share == 1
    ignored = _MAY_DIFFER | {"dampening"} if heavy_ball else _MAY_DIFFER
    return tuple(getattr(rule, field.name) for field in fields(rule) if field.name not in ignored)


def _speed(rule: UpdateRule) -> float:
    """Return the learning rate times the weight of the gradient in the momentum."""
    return rule.lr * (1 - rule.dampening if rule.momentum else 1.0)


def _block_preconditioner(block: OptimizerBlock) -> StepPreconditioner:
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


def _group_decays(block: OptimizerBlock) -> tuple[float, ...]:
    """Return the coupled weight decay of each group."""
    rule = block.rule
    return rule.group_weight_decays or (rule.weight_decay,) * len(block.optimizer.param_groups)


def _filtered_decays(block: OptimizerBlock) -> tuple[float, ...]:
    """Return the decay of each group that joins the preconditioned gradient."""
    rule = block.rule
    count = len(block.optimizer.param_groups)
    return rule.group_filtered_decays or (rule.filtered_weight_decay,) * count


def _block_diagonal(
    blocks: Sequence[StepPreconditioner], factors: Sequence[float]
) -> StepPreconditioner:
    """Return the block-diagonal matrix, as a diagonal preconditioner if all blocks are diagonal."""
    if not all(isinstance(block, DiagonalPreconditioner) for block in blocks):
        return BlockPreconditioner(blocks, factors)
    entries = [
        entry * factor
        for block, factor in zip(blocks, factors, strict=True)
        if isinstance(block, DiagonalPreconditioner)
        for entry in block.entries
    ]
    return DiagonalPreconditioner([p for block in blocks for p in block.params], entries)
