"""`Measurer`: measures the margins of one training run again and again, with warm starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import positive, whole
from stableopt.curvature.problem.differentiable_loss import DifferentiableLoss
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.distributed.collectives import LostRankError
from stableopt.monitor.sample_counter import SampleCounter
from stableopt.sinks.delivery import WarnOnce
from stableopt.sinks.events import Measured
from stableopt.stability.layers.blocks import Blocks, blocks_of
from stableopt.stability.measure.evaluation import ROUNDED
from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.measure.measure import check_quantities, measure_at
from stableopt.stability.measure.quantities import DEFAULT_QUANTITIES, QUANTITIES
from stableopt.stability.measure.taken_step import TakenStep, Trail
from stableopt.stability.rules.coordinates import as_seen_by, check_params
from stableopt.stability.rules.limits import noise_factor
from stableopt.stability.rules.preconditioner import UnknownStep
from stableopt.stability.rules.several import rule_of
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["Measurer"]

_UNKNOWN = 60
"""Gradients that a quantity without an estimate is taken for: a dozen structured products."""


class Measurer:
    """Measures an optimizer's problem as it stands, warm-started from the last eigenvectors.

    Arguments are those of :class:`~stableopt.StabilityMonitor`, and ``explicit``: whether the user
    chose the parameters that count.

    Attributes:
        problem: the problem; another one once the model's trainable parameters change.
        quantities: what is measured, in the order in which it is.
        starts: the eigenvectors to start from ``(k, d)`` by quantity, the top one first.
        memory: plain numbers that quantities keep between measurements.
        trail: the end of the last measured step, if every step is measured.
        measured: how many measurements there were.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        problem: MeanLoss,
        counter: SampleCounter,
        warn: WarnOnce,
        *,
        explicit: bool,
        update_rule: UpdateRule | Callable[[Any], UpdateRule] | None,
        quantities: Iterable[str],
        batch_size: int | None,
        dataset_size: int | None,
        tol: float,
        max_iter: int,
        cold_every: int,
        seed: int,
        window: int | None = None,
        spectrum_every: int = 20,
        blocks: Blocks | None = None,
    ) -> None:
        self._optimizers, self.problem, self._explicit = optimizers, problem, explicit
        self._counter, self._warn = counter, warn
        self._update_rule = update_rule
        self.tol, self.max_iter = positive("tol", tol), whole("max_iter", max_iter)
        self._cold_every = whole("cold_every", cold_every, least=0)
        self._spectrum_every = whole("spectrum_every", spectrum_every)
        self._seed = whole("seed", seed, least=0)
        check_params(optimizers, problem, explicit=explicit)
        rule = self.rule()
        if isinstance(rule.preconditioner, UnknownStep) and quantities is DEFAULT_QUANTITIES:
            quantities = (*quantities, "realised_edge")  # the one margin that needs no rule
        self.quantities = check_quantities(quantities, rule, sharded=problem.sharded, steps=True)
        limited = not all(QUANTITIES[name].any_rule for name in self.quantities)
        if limited and isinstance(rule.preconditioner, UnknownStep):
            warn("limits are not known", rule.preconditioner.reason)
        as_seen_by(problem, rule, optimizers)  # raises where the groups do not fit
        self._probe_is_all = dataset_size is None
        size = problem.num_samples if dataset_size is None else dataset_size
        self._dataset_size = whole("dataset_size", size)
        self._batch_size = None if batch_size is None else whole("batch_size", batch_size)
        if self._batch_size is not None:
            noise_factor(self._batch_size, self._dataset_size)  # raises for a batch above n
        self._window = None if window is None else whole("realised_window", window)
        self._chosen = list(blocks) if isinstance(blocks, Iterator) else blocks
        self._blocks = blocks_of(problem.model, problem.names, problem.params, self._chosen)
        self.starts: dict[str, Tensor] = {}
        self.memory: dict[str, Any] = {}
        self.trail = Trail()
        self.measured = 0
        self._of_all_ranks: int | None = None

    @property
    def batch_size(self) -> int | None:
        """Samples in a step, as given or observed; of all ranks, as of the last measurement."""
        if self._batch_size is not None:
            return self._batch_size
        return self._of_all_ranks if self.problem.ranks.several else self._counter.batch_size

    def rule(self) -> UpdateRule:
        """Return the update rule as it stands now.

        Raises:
            TypeError: for an ``update_rule`` of another kind, and as ``UpdateRule.from_optimizer`` does.
        """
        if self._update_rule is None:
            return rule_of(self._optimizers)
        rule = self._update_rule
        if not isinstance(rule, UpdateRule) and callable(rule):
            several = len(self._optimizers) > 1
            rule = rule(list(self._optimizers) if several else self._optimizers[0])
        if not isinstance(rule, UpdateRule):
            raise TypeError(
                f"update_rule={self._update_rule!r}: expected an UpdateRule, or a function of the"
                " optimizer that returns one"
            )
        return rule

    def expected_seconds(self) -> float:
        """Return what a measurement is expected to take, from the time of one gradient."""
        if not isinstance(self.problem, DifferentiableLoss) or self.problem.sharded:
            return 0.0
        costs = self.problem.cost(tol=self.tol)
        rule, names = self.rule(), list(self.quantities)
        if "sharpness" in names and rule.preconditioned:
            names.append("preconditioned_sharpness")
        unknown = _UNKNOWN * costs["gradient"].seconds
        return sum(costs[name].seconds if name in costs else unknown for name in names)

    def eigenvectors(self) -> dict[str, Tensor]:
        """Return the top eigenvectors ``(d,)`` by quantity, in the precision of the problem."""
        return {name: rows[0].to(self.problem.dtype) for name, rows in self.starts.items()}

    @property
    def steps(self) -> bool:
        """Whether a quantity needs the parameters as they were before the step."""
        return any("taken_step" in QUANTITIES[name].needs for name in self.quantities)

    def measure_or_fail(self, step: int, taken: TakenStep | None = None) -> Measured:
        """Measure after ``step``; an error becomes the ``failure`` of the margins."""
        try:
            return self.measure(step, taken)
        except LostRankError:  # training cannot continue either, and would hang
            raise
        except Exception as error:  # measuring must not end the training
            failure = f"{type(error).__name__}: {error}"
            return Measured(step, StabilityMargins(step=step, failure=failure))

    def measure(self, step: int, taken: TakenStep | None = None) -> Measured:
        """Measure after ``step``; errors are raised, other than curvature that is not finite.

        ``taken`` has the parameters before the step.
        """
        rule = self.rule()
        self._follow()
        self._of_all_ranks = (
            int(self.problem.ranks.all_reduce_sum(self._counter.batch_size or 0)) or None
        )
        # A rule of the full batch may evaluate it many times a step: the count is not a batch size.
        batch_size = None if rule.full_batch else self.batch_size
        dataset_size = self._dataset_size if rule.full_batch else self._known_dataset_size()
        wanted = "non_uniformity" in self.quantities and not rule.full_batch
        if step and wanted and batch_size is None:
            self._warn(
                "the limit of the non-uniformity is not known",
                "no samples of a step were counted; pass batch_size=, or call count_samples",
            )
        cold = self.measured % (self._cold_every + 1) == 0
        margins, subspaces = measure_at(
            as_seen_by(self.problem, rule, self._optimizers),
            rule,
            batch_size=batch_size,
            dataset_size=dataset_size,
            quantities=self._now(),
            tol=self.tol,
            max_iter=self.max_iter,
            # A new seed each time: the same noise would always miss the same direction.
            seed=self._seed + self.measured,
            starts={} if cold else self.starts,
            step=step,
            taken=taken,
            memory=self.memory,
            window=self._window,
            blocks=self._blocks,
        )
        self.measured += 1
        self.starts = subspaces
        return Measured(step, margins, rule)

    def _now(self) -> list[str]:
        """Return the quantities of this measurement: rare ones have their turn now and then."""
        turn = self.measured % self._spectrum_every == 0
        return [name for name in self.quantities if turn or not QUANTITIES[name].rare]

    def checked(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return saved ``starts`` on the device of the problem, in its precision or rounded.

        Raises:
            ValueError: if they are not of its size.
        """
        size = self.problem.num_params
        for name, subspace in starts.items():
            if subspace.shape[-1:] != (size,):
                raise ValueError(
                    f"state_dict: the subspace of {name} has shape {tuple(subspace.shape)},"
                    f" and the model has {size} parameters"
                )
        device, dtype = self.problem.device, self.problem.dtype
        return {
            name: rows.to(device, ROUNDED if rows.dtype == ROUNDED else dtype)
            for name, rows in starts.items()
        }

    def _follow(self) -> None:
        """Continue with the model's parameters where they have changed, as when layers thaw."""
        problem = self.problem.current()
        if problem is not self.problem:
            check_params(self._optimizers, problem, explicit=self._explicit)
            self.problem, self.starts = problem, {}
            self._blocks = blocks_of(
                problem.model, problem.names, problem.params, self._chosen, strict=False
            )

    def _known_dataset_size(self) -> int | None:
        batch_size, size = self.batch_size, self._dataset_size
        if self._batch_size is None and batch_size is not None and batch_size > size:
            if not self._probe_is_all:
                raise ValueError(
                    f"steps of {batch_size} samples were observed, above dataset_size={size}"
                )
            self._warn(
                f"steps have more samples than the {size} probe samples",
                "limits are for an infinite data set; pass dataset_size= or batch_size=",
            )
            return None
        return size
