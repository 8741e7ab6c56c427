"""`Measurer`: repeated measurements of one training run's margins, with warm starts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt._support.arguments import finite_size, positive, shown, whole
from stableopt._support.warn_once import WarnOnce
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.problem import Problem
from stableopt.distributed.collectives import LostRankError
from stableopt.monitor.sample_counter import SampleCounter
from stableopt.sinks.events import Measured
from stableopt.stability.layers.blocks import Blocks, blocks_of
from stableopt.stability.measure.evaluation import WARM_START_DTYPE, Evaluation
from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.measure.measure import check_quantities, measurable, measure_at
from stableopt.stability.measure.registry import DEFAULT_QUANTITIES, QUANTITIES
from stableopt.stability.measure.taken_step import StepEndCache, TakenStep
from stableopt.stability.rules.coordinates import check_params, in_rule_coordinates
from stableopt.stability.rules.limits import checked_batch_size
from stableopt.stability.rules.several import rule_of
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["Measurer", "Tracking", "needs_second_derivatives"]

_UNKNOWN = 60
"""Assumed cost, in gradients, of a quantity without a cost estimate: a dozen structured products."""


_WITH_EIGENVECTOR = ("sharpness", "preconditioned_sharpness", "non_uniformity")
"""Quantities whose warm start is an eigenvector. Others keep, for instance, those of all layers."""


class Tracking(NamedTuple):
    """What the next measurement of a run depends on.

    Attributes:
        measured: the number of measurements so far.
        starts: the last subspaces by quantity.
        memory: numbers and lists that quantities keep.
    """

    measured: int
    starts: dict[str, Tensor]
    memory: dict[str, Any]


class Measurer:
    """Measures the problem at the present parameters, warm-started from the last eigenvectors.

    The arguments are those of :class:`~stableopt.StabilityMonitor`.

    Attributes:
        problem: the problem; a new one after the model's trainable parameters change.
        quantities: the names of the quantities, in the order of measurement.
        starts: the warm starts ``(k, d)`` by quantity, the top eigenvector first.
        memory: numbers that quantities keep between measurements.
        step_end_cache: the end of the last measured step, if every step is measured.
        measured: the number of measurements so far.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        problem: MeanLoss,
        counter: SampleCounter,
        warn: WarnOnce,
        *,
        update_rule: UpdateRule | Callable[[Any], UpdateRule] | None,
        quantities: Iterable[str],
        batch_size: int | None,
        dataset_size: float | None,
        tol: float,
        max_iter: int,
        cold_every: int,
        seed: int,
        window: int | None = None,
        spectrum_every: int = 20,
        blocks: Blocks | None = None,
    ) -> None:
        self._optimizers, self.problem = optimizers, problem
        self._counter, self._warn = counter, warn
        self._update_rule = update_rule
        self.tol, self.max_iter = positive("tol", tol), whole("max_iter", max_iter)
        self._cold_every = whole("cold_every", cold_every, least=0)
        self._spectrum_every = whole("spectrum_every", spectrum_every)
        self._seed = whole("seed", seed, least=0)
        check_params(optimizers, problem)
        rule = self.rule()
        stays_unknown = not (rule.has_limit or rule.awaits_step)
        if stays_unknown and quantities is DEFAULT_QUANTITIES:
            quantities = (*quantities, "realised_edge")  # the only margin that needs no rule
        self.quantities = check_quantities(quantities, rule, sharded=problem.sharded, steps=True)
        needs_limits = not all(QUANTITIES[name].any_rule for name in self.quantities)
        if needs_limits and stays_unknown:
            warn("limits are not known", str(rule.unknown))
        in_rule_coordinates(problem, rule, optimizers)  # raises if groups and problem do not match
        self._probe_is_dataset = dataset_size is None
        self._dataset_size = finite_size(
            dataset_size, problem.num_samples, full_batch=rule.full_batch
        )
        self._batch_size = batch_size
        if batch_size is not None:
            self._batch_size = checked_batch_size(batch_size, self._dataset_size)
        self._window = None if window is None else whole("realised_window", window)
        self._blocks_argument = list(blocks) if isinstance(blocks, Iterator) else blocks
        self._blocks = blocks_of(
            problem.model, problem.names, problem.params, self._blocks_argument
        )
        self.starts: dict[str, Tensor] = {}
        self.memory: dict[str, Any] = {}
        self.step_end_cache = StepEndCache()
        self.measured = 0
        self._summed_batch_size: int | None = None

    @property
    def batch_size(self) -> int | None:
        """Samples in a step, as given or observed; with several ranks, the last measurement's sum."""
        if self._batch_size is not None:
            return self._batch_size
        return self._summed_batch_size if self.problem.ranks.several else self._counter.batch_size

    def rule(self) -> UpdateRule:
        """Return the present update rule.

        Raises:
            TypeError: for an invalid ``update_rule``, and as ``UpdateRule.from_optimizer`` does.
        """
        if self._update_rule is None:
            return rule_of(self._optimizers)
        rule = self._update_rule
        if not isinstance(rule, UpdateRule) and callable(rule):
            several = len(self._optimizers) > 1
            rule = rule(list(self._optimizers) if several else self._optimizers[0])
        if not isinstance(rule, UpdateRule):
            raise TypeError(
                f"update_rule={shown(self._update_rule)}: expected an UpdateRule, or a function of the"
                " optimizer that returns one"
            )
        return rule

    def expected_seconds(self) -> float:
        """Return the expected seconds of a measurement, from the time of one gradient."""
        if not isinstance(self.problem, Problem):
            return 0.0
        costs = self.problem.cost(tol=self.tol)
        assumed = _UNKNOWN * costs["gradient"].seconds
        now, after_a_step = measurable(self.quantities, self.rule())
        names = (*now, *after_a_step)
        return sum(costs[name].seconds if name in costs else assumed for name in names)

    def eigenvectors(self) -> dict[str, Tensor]:
        """Return the top eigenvectors ``(d,)`` by quantity, in the problem's precision."""
        starts = {name: self.starts[name] for name in _WITH_EIGENVECTOR if name in self.starts}
        return {name: rows[0].to(self.problem.dtype) for name, rows in starts.items()}

    @property
    def needs_steps(self) -> bool:
        """Whether a quantity needs the parameters before the step."""
        return any("taken_step" in QUANTITIES[name].needs for name in self.quantities)

    def measure_or_fail(self, step: int, taken_step: TakenStep | None = None) -> Measured:
        """Measure after ``step``; an error becomes the ``failure`` of the margins."""
        try:
            return self.measure(step, taken_step)
        except LostRankError:
            raise  # training would hang
        except Exception as error:  # training must continue
            failure = f"{type(error).__name__}: {error}"
            return Measured(step, StabilityMargins(step=step, failure=failure))

    def measure(self, step: int, taken_step: TakenStep | None = None) -> Measured:
        """Measure after ``step``, given ``taken_step`` if it was recorded.

        A loss or curvature that is not finite becomes the ``failure`` of the margins; other errors
        are raised.
        """
        rule = self.rule()
        self._update_problem()
        own = math.nan if self._counter.failed else self._counter.batch_size or 0
        total = self.problem.ranks.all_reduce_sum(own)
        self._summed_batch_size = None if math.isnan(total) else int(total) or None
        if not rule.full_batch:
            batch_size, dataset_size = self.batch_size, self._effective_dataset_size()
        else:  # it may evaluate the batch several times a step: the count is not its size
            batch_size = dataset_size = self._dataset_size
        if step and "non_uniformity" in self.quantities and batch_size is None:
            reason = "no samples of a step were counted"
            if not self._counter.passed:
                reason = "the size of the model's inputs is not a multiple of the batch size"
            self._warn(
                "the limit of the non-uniformity is not known",
                f"{reason}; pass batch_size=, or call count_samples",
            )
        cold = self.measured % (self._cold_every + 1) == 0
        evaluation = Evaluation(
            in_rule_coordinates(self.problem, rule, self._optimizers),
            rule,
            batch_size=batch_size,
            dataset_size=dataset_size,
            tol=self.tol,
            max_iter=self.max_iter,
            # A new seed for each measurement: the same noise would always miss the same direction.
            seed=self._seed + self.measured,
            starts={} if cold else self.starts,
            taken_step=taken_step,
            memory=self.memory,
            window=self._window,
            blocks=self._blocks,
        )
        margins = measure_at(evaluation, self._current_quantities(), step=step)
        self.measured += 1
        self.starts = evaluation.subspaces if margins.failure is None else {}
        return Measured(step, margins, rule)

    def warn_of(self, margins: StabilityMargins) -> None:
        """Warn once for each reason why ``margins`` lack a number, or have one that did not converge."""
        if margins.failure is not None:
            self._warn(f"the measurement at step {margins.step} failed", margins.failure)
        elif margins.failures:
            for name, reason in margins.failures.items():
                self._warn(f"{name} was not measured at step {margins.step}", reason)
        elif not margins.converged:
            reason = f"in {self.max_iter} products; raise max_iter or tol"
            failed = {name for name, m in margins.measurements.items() if not m.converged}
            if failed == {"critical_sharpness"}:
                reason = "the bracket of critical_sharpness is wide"
            self._warn(f"the measurement at step {margins.step} did not converge", reason)

    def _current_quantities(self) -> list[str]:
        """Return the quantities of this measurement; rare ones only once in ``spectrum_every``."""
        with_rare = self.measured % self._spectrum_every == 0
        return [name for name in self.quantities if with_rare or not QUANTITIES[name].rare]

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undo what a measurement in the block changes, so that the next does not depend on it."""
        problem, before, end = self.problem, self._tracking(), self.step_end_cache.end
        try:
            yield
        finally:
            # The starts of another problem are those of other parameters.
            starts = before.starts if self.problem is problem else self.starts
            self.restore(before._replace(starts=starts))
            self.step_end_cache.end = end

    def _tracking(self) -> Tracking:
        return Tracking(self.measured, self.starts, copy.deepcopy(self.memory))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next measurement depends on, as plain numbers, dicts and tensors."""
        # Starts from before unfreezing are of other parameters: the next measurement drops them.
        starts = {} if self._has_other_params() else dict(self.starts)
        return self._tracking()._replace(starts=starts)._asdict()

    def read_state(self, state: Mapping[str, Any]) -> Tracking:
        """Return what a :meth:`state_dict` holds, for :meth:`restore`, and change nothing.

        Raises:
            Exception: ``ValueError`` if the starts do not have the problem's size; or any error over an
                entry of a wrong kind.
        """
        memory = dict(state.get("memory", {}))  # older checkpoints lack it
        return Tracking(int(state["measured"]), self._checked(state["starts"]), memory)

    def restore(self, tracking: Tracking) -> None:
        """Continue from ``tracking``."""
        self.measured, self.starts, memory = tracking
        self.memory = copy.deepcopy(memory)

    def forget_step(self) -> None:
        """Free the gradient at the end of the last step."""
        self.step_end_cache.end = None

    def _has_other_params(self) -> bool:
        try:
            return self.problem.current() is not self.problem
        except ValueError:  # no parameter is trainable
            return True

    def _checked(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return saved ``starts`` on the problem's device, in its precision or rounded."""
        size = self.problem.num_params
        for name, subspace in starts.items():
            if subspace.shape[-1:] != (size,):
                raise ValueError(
                    f"state_dict: the subspace of {name} has shape {tuple(subspace.shape)},"
                    f" and the model has {size} parameters"
                )
        device, dtype = self.problem.device, self.problem.dtype
        return {
            name: rows.to(device, WARM_START_DTYPE if rows.dtype == WARM_START_DTYPE else dtype)
            for name, rows in starts.items()
        }

    def _update_problem(self) -> None:
        """Replace the problem if the model's trainable parameters have changed, as by unfreezing."""
        problem = self.problem.current()
        if problem is not self.problem:
            check_params(self._optimizers, problem)
            self.problem, self.starts = problem, {}
            self._blocks = blocks_of(
                problem.model, problem.names, problem.params, self._blocks_argument, strict=False
            )

    def _effective_dataset_size(self) -> int | None:
        """Return the dataset size; ``None``, for infinite, if observed steps exceed the probe set."""
        batch_size, size = self.batch_size, self._dataset_size
        if self._batch_size is None and size is not None and (batch_size or 0) > size:
            if not self._probe_is_dataset:
                raise ValueError(
                    f"dataset_size={size} is below the {batch_size} samples observed in a step: pass"
                    " the size of the training set, or batch_size="
                )
            self._warn(
                f"steps have more samples than the {size} probe samples",
                "limits are for an infinite data set; pass dataset_size= or batch_size=",
            )
            return None
        measures_noise = "non_uniformity" in self.quantities or any(
            "batch_size" in QUANTITIES[name].needs for name in self.quantities
        )
        is_observed = self._probe_is_dataset and self._batch_size is None
        if measures_noise and is_observed and batch_size == size:
            self._warn(
                f"steps have as many samples as the probe, {size}, and count as full batches",
                "full batches have no noise; if the training set is larger, pass dataset_size=",
            )
        return size


def needs_second_derivatives(quantities: Iterable[str]) -> bool:
    """Return whether a quantity needs more than losses and gradients; true if none is valid."""
    names = quantities if isinstance(quantities, Iterable) else ()
    valid = [QUANTITIES[name] for name in names if name in QUANTITIES]
    return not valid or not all(quantity.first_order for quantity in valid)
