"""When to measure, at what cost, and whom to tell.

Three examples::

    StabilityMonitor(optimizer, model, loss_fn, (x, y), every=50)          # any torch optimizer
    StabilityMonitor(optimizer, model, loss_fn, (x, y), max_overhead=0.05) # 5 % of training time
    with StabilityMonitor(optimizer, Problem.from_batch_loss(model, loss, data), every=10): ...
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import median_low
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._arguments import positive, whole
from stableopt._torch import eager
from stableopt.curvature import Problem
from stableopt.curvature.problem.parameters import group_of
from stableopt.distributed import LostRankError
from stableopt.monitor.sample_counter import SampleCounter
from stableopt.stability.limits import noise_factor
from stableopt.stability.margins import StabilityMargins
from stableopt.stability.measure.measure import (
    as_seen_by,
    check_params,
    check_quantities,
    measure_at,
    problem_of,
)
from stableopt.stability.rules.update_rule import UpdateRule, base_optimizer

__all__ = ["Sink", "StabilityMonitor"]

Sink = Callable[[int, dict[str, float]], Any]
"""Anything that takes ``(step, record)``; a ``flush()`` is called when a monitor closes."""

DEFAULT_OVERHEAD = 0.05

_OBSERVED_STEPS = 5
"""Steps whose median is the observed batch size: one ragged batch, or one skipped step whose
samples are counted with the next, does not change it."""

_HISTORY = 10_000


class StabilityMonitor:
    r"""Measures the stability margins of a run from the hooks of any ``torch.optim.Optimizer``.

    Training with a monitor is bit for bit the training without it. A measurement that fails, by a
    loss that is not finite or by an error, is recorded with its reason and warned of once; training
    goes on.

    Args:
        optimizer: the optimizer whose steps count; :meth:`UpdateRule.from_optimizer` must know it, or
            ``update_rule`` be given. Of one that Accelerate prepared, those of the optimizer inside.
        model: the model, or a ready :class:`~stableopt.curvature.Problem` in place of ``model``,
            ``loss_fn`` and ``data``.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the probe set, on which curvature is measured: the training set, or a part of it.
        every: measure after each so many steps.
        max_overhead: or: measure as often as that share of the training time allows. The default,
            at 0.05, where ``every`` is not given.
        batch_size: samples in a step, of all ranks; by default what the model's forward passes show,
            accumulated over a step and as the median of the last five steps.
        dataset_size: samples in the training set, by default those of the probe set.
        quantities: any of ``"sharpness"``, ``"preconditioned_sharpness"``, ``"non_uniformity"``,
            ``"theorem1"``, ``"critical_lr"``, ``"batch_sharpness"``. Sharpness comes with the
            preconditioned one where the optimizer has a preconditioner, which is what its limit is on.
        sinks: callables that take ``(step, record)`` after each measurement.
        update_rule: the rule, or a function of the optimizer that returns it: for optimizers that are
            not known, with their preconditioner if they have one.
        params: the parameters that count; all trainable ones of the model by default.
        chunk_size: the most samples evaluated at once.
        dtype: the precision to measure in, as for ``Problem``: the parameters' own by default.
        process_group: a ``torch.distributed`` group whose ranks measure together, each with its shard
            as ``data``; by default that of a ``DistributedDataParallel`` model, or of one under
            ``fully_shard``. Every rank must then make the monitor: to measure replicas on one alone,
            pass it ``model.module``. Rank 0 decides when to measure, and tells the sinks.
        tol: the largest residual relative to the eigenvalue.
        max_iter: the largest number of products for each quantity and measurement.
        cold_every: how many measurements follow the eigenvectors of the last before one starts afresh.
        seed: of the eigen-solver.

    Attributes:
        step: steps of the optimizer seen so far.
        history: the latest 10,000 :class:`StabilityMargins`, oldest first.

    Raises:
        ValueError: for arguments out of range, parameters that the optimizer does not hold, and as
            ``Problem`` does.
        TypeError: as ``Problem`` and ``UpdateRule.from_optimizer`` do.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
    >>> with StabilityMonitor(optimizer, model, nn.MSELoss(), (x, y), every=1) as monitor:
    ...     nn.MSELoss()(model(x), y).backward()
    ...     optimizer.step()
    >>> round(monitor.margins.sharpness, 3), monitor.margins.sharpness_limit
    (6.0, 20.0)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | Problem,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        data: Any = None,
        *,
        every: int | None = None,
        max_overhead: float | None = None,
        batch_size: int | None = None,
        dataset_size: int | None = None,
        quantities: Iterable[str] = ("sharpness",),
        sinks: Iterable[Sink] = (),
        update_rule: UpdateRule | Callable[[Any], UpdateRule] | None = None,
        params: Iterable[Tensor] | None = None,
        chunk_size: int | None = None,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
        tol: float = 0.03,
        max_iter: int = 50,
        cold_every: int = 20,
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer={optimizer!r}: expected a torch.optim.Optimizer")
        if every is not None and max_overhead is not None:
            raise ValueError("every and max_overhead: expected at most one of them")
        self._every = None if every is None else whole("every", every)
        self._max_overhead = positive(
            "max_overhead", DEFAULT_OVERHEAD if max_overhead is None else max_overhead
        )
        self._cold_every = whole("cold_every", cold_every, least=0)
        self._tol, self._max_iter = positive("tol", tol), whole("max_iter", max_iter)
        self._seed = whole("seed", seed, least=0)
        self.sinks = check_sinks(sinks)
        self.optimizer = optimizer = base_optimizer(optimizer)
        self._update_rule = update_rule
        self.problem = problem_of(
            model,
            loss_fn,
            data,
            params=params,
            chunk_size=chunk_size,
            dtype=dtype,
            process_group=group_of(model) if process_group is None else process_group,
        )
        self._explicit = params is not None
        check_params(optimizer, self.problem, explicit=self._explicit)
        rule = self._rule()
        self.quantities = check_quantities(quantities, rule, sharded=self.problem.sharded)
        as_seen_by(self.problem, rule, optimizer)  # raises where the groups do not fit
        probe_size = self.problem.num_samples
        self._probe_is_all = dataset_size is None
        self._dataset_size = (
            probe_size if dataset_size is None else whole("dataset_size", dataset_size)
        )
        self._batch_size = None if batch_size is None else whole("batch_size", batch_size)
        if self._batch_size is not None:
            noise_factor(self._batch_size, self._dataset_size)  # raises for a batch above n

        self.step = 0
        self.history: deque[StabilityMargins] = deque(maxlen=_HISTORY)
        self._starts: dict[str, Tensor] = {}
        self._measured = 0
        self._pending = False
        self._seconds, self._last_seconds, self._last_step = 0.0, 0.0, 0
        self._began = self._last_end = time.perf_counter()
        self._observed: deque[int] = deque(maxlen=_OBSERVED_STEPS)
        self._of_all_ranks: int | None = None
        self._next_question = 0
        self._warned: set[str] = set()

        self._counter = SampleCounter()
        observed = model if isinstance(model, nn.Module) else self.problem.model
        self._handles = [
            # This one first: modules of torch.jit refuse it, and nothing must be left behind.
            observed.register_forward_pre_hook(self._counter, with_kwargs=True),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def margins(self) -> StabilityMargins | None:
        """The latest measurement, a failed one included; ``None`` before the first."""
        return self.history[-1] if self.history else None

    @property
    def batch_size(self) -> int | None:
        """Samples in a step, as given or observed; ``None`` before the first step.

        Where several ranks train, those of all of them, as of the last measurement.
        """
        if self._batch_size is not None:
            return self._batch_size
        if self.problem.ranks.several:
            return self._of_all_ranks
        return median_low(self._observed) if self._observed else None

    @property
    def update_rule(self) -> UpdateRule:
        """The update rule, read from the optimizer as it stands now."""
        return self._rule()

    @property
    def eigenvectors(self) -> dict[str, Tensor]:
        """The top eigenvectors ``(d,)`` of the latest measurement by quantity, if it found any.

        In the coordinates of the update rule; where its preconditioner is not a part of these, as
        L-BFGS's, the covector, of which the eigenvector is the preconditioner's image.
        """
        return {name: subspace[0] for name, subspace in self._starts.items()}

    @property
    def overhead(self) -> float:
        """Time spent measuring, as a share of the time spent training since the monitor began."""
        training = time.perf_counter() - self._began - self._seconds
        return self._seconds / training if training > 0 else math.inf

    def count_samples(self, batch: Any) -> None:
        """Count the samples of ``batch`` for the step to come, and of forward passes no longer.

        For loops that call parts of the model rather than the model itself.

        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
        >>> with StabilityMonitor(optimizer, model, nn.MSELoss(), (x, y), every=1) as monitor:
        ...     monitor.count_samples((x, y))
        ...     nn.MSELoss()(model[0](x), y).backward()
        ...     optimizer.step()
        >>> monitor.batch_size
        4
        """
        self._counter.active = False
        self._counter.add(batch)

    def measure(self) -> StabilityMargins:
        """Measure now, whatever the step; record the result and tell the sinks. On every rank.

        Raises:
            Exception: whatever goes wrong, other than curvature that is not finite.
        """
        return self._timed(self._measure_now)

    def _timed(self, measured: Callable[[], StabilityMargins]) -> StabilityMargins:
        device = self.problem.device
        if device.type == "cuda":
            # Work that training has queued is not the measurement's.
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        try:
            return self._tell(measured())
        finally:
            self._last_end = time.perf_counter()
            self._last_seconds, self._last_step = self._last_end - began, self.step
            self._seconds += self._last_seconds

    def _measured_or_failed(self) -> StabilityMargins:
        try:
            return self._measure_now()
        except LostRankError:  # the training cannot go on either, and would hang
            raise
        except Exception as error:  # measuring must not end the training
            return StabilityMargins(step=self.step, failure=f"{type(error).__name__}: {error}")

    def _measure_now(self) -> StabilityMargins:
        rule = self._rule()
        self._follow()
        own = median_low(self._observed) if self._observed else 0
        self._of_all_ranks = int(self.problem.ranks.all_reduce_sum(own)) or None
        # A rule of the full batch may look at it many times a step: what was counted is no batch.
        whole_set = rule.full_batch
        batch_size = None if whole_set else self.batch_size
        dataset_size = self._dataset_size if whole_set else self._known_dataset_size()
        cold = self._measured % (self._cold_every + 1) == 0
        margins, subspaces = measure_at(
            as_seen_by(self.problem, rule, self.optimizer),
            rule,
            batch_size=batch_size,
            dataset_size=dataset_size,
            quantities=self.quantities,
            tol=self._tol,
            max_iter=self._max_iter,
            # A new seed each time: noise that is always the same would never see what it missed.
            seed=self._seed + self._measured,
            starts={} if cold else self._starts,
            step=self.step,
        )
        self._measured += 1
        self._starts = subspaces
        return margins

    def _follow(self) -> None:
        """Go on with the model's parameters where they have changed, as when layers thaw."""
        problem = self.problem.current()
        if problem is not self.problem:
            check_params(self.optimizer, problem, explicit=self._explicit)
            self.problem, self._starts = problem, {}

    def _tell(self, margins: StabilityMargins) -> StabilityMargins:
        self.history.append(margins)
        if margins.failure is not None:
            self._warn(f"the measurement at step {margins.step} failed", margins.failure)
        elif not margins.converged:
            self._warn(
                f"the measurement at step {margins.step} did not converge",
                f"in {self._max_iter} products; raise max_iter or tol",
            )
        record = margins.record()
        for sink in self.sinks if self.problem.ranks.rank == 0 else ():
            try:
                sink(margins.step, dict(record))
            except Exception as error:
                self._warn(
                    f"the sink {type(sink).__name__} failed", f"{type(error).__name__}: {error}"
                )
        return margins

    def _rule(self) -> UpdateRule:
        if self._update_rule is None:
            return UpdateRule.from_optimizer(self.optimizer)
        rule = self._update_rule
        if not isinstance(rule, UpdateRule) and callable(rule):
            rule = rule(self.optimizer)
        if not isinstance(rule, UpdateRule):
            raise TypeError(
                f"update_rule={self._update_rule!r}: expected an UpdateRule, or a function of the"
                " optimizer that returns one"
            )
        return rule

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

    def _warn(self, what: str, why: str) -> None:
        if why not in self._warned and self.problem.ranks.rank == 0:
            self._warned.add(why)
            warnings.warn(f"{what}: {why}", RuntimeWarning, stacklevel=2)

    @eager
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        samples = self._counter.take()
        self.step += 1
        if samples:
            self._observed.append(samples)
        if self._turn():
            self._timed(self._measured_or_failed)

    def _turn(self) -> bool:
        """Whether to measure after this step; where several ranks train, as rank 0 finds."""
        ranks = self.problem.ranks
        if ranks.several and self.step < self._next_question:
            return False
        self._pending = self._pending or self._due()
        turn = self._pending and self._moved()
        self._pending = self._pending and not turn
        if ranks.several:
            found = turn, self._pending, self.step + self._steps_to_go()
            turn, self._pending, self._next_question = ranks.broadcast_object(found)
        return turn

    def _steps_to_go(self) -> int:
        """Return after how many steps the ranks should ask again: at each would be a broadcast."""
        if self._pending:
            return 1
        if self._every is not None:
            return self._every - self.step % self._every
        waited = time.perf_counter() - self._last_end
        each = waited / max(self.step - self._last_step, 1)
        left = self._last_seconds / self._max_overhead - waited
        # Half of what seems to be left, since steps differ: soon the half is none.
        return max(1, int(left / each / 2))

    def _due(self) -> bool:
        if self._every is not None:
            return self.step % self._every == 0
        # The training time since the last measurement has paid for one like it.
        waited = time.perf_counter() - self._last_end
        return waited >= self._last_seconds / self._max_overhead

    def _moved(self) -> bool:
        """Whether the step changed anything: not at rate zero, nor skipped by a gradient scaler."""
        if all(float(group.get("lr", 1.0)) == 0 for group in self.optimizer.param_groups):
            return False
        found_inf = getattr(self.optimizer, "found_inf", None)
        return found_inf is None or not bool(torch.as_tensor(found_inf).any())

    def close(self) -> None:
        """Detach from optimizer and model, and flush the sinks; ``history`` stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for sink in self.sinks:
            if callable(flush := getattr(sink, "flush", None)):
                try:
                    flush()
                except Exception as error:  # it must not hide the error that ends a `with`
                    self._warn(f"the sink {type(sink).__name__} failed to flush", repr(error))

    def __enter__(self) -> StabilityMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return steps, history and subspaces as plain numbers, lists, dicts and tensors."""
        return {
            "step": self.step,
            "measured": self._measured,
            "pending": self._pending,
            "observed": list(self._observed),
            "starts": dict(self._starts),
            "history": [margins.to_dict() for margins in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            ValueError: if its subspaces are not of this model's size.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state_dict lacks {sorted(missing)}")
        size = self.problem.num_params
        for name, subspace in state["starts"].items():
            if subspace.shape[-1:] != (size,):
                raise ValueError(
                    f"state_dict: the subspace of {name} has shape {tuple(subspace.shape)},"
                    f" and the model has {size} parameters"
                )
        device, dtype = self.problem.device, self.problem.dtype
        starts = {name: kept.to(device, dtype) for name, kept in state["starts"].items()}
        history = [StabilityMargins.from_dict(margins) for margins in state["history"]]
        # Nothing is changed before all of it has been read.
        self._starts = starts
        self.step, self._measured = state["step"], state["measured"]
        self._pending, self._next_question = bool(state["pending"]), 0
        self._observed = deque(state["observed"], maxlen=_OBSERVED_STEPS)
        self.history = deque(history, maxlen=_HISTORY)


def check_sinks(sinks: Any) -> list[Sink]:
    """Return ``sinks`` as a list; a single one may stand for a list of it."""
    if callable(sinks):
        sinks = [sinks]
    if isinstance(sinks, str) or not isinstance(sinks, Iterable):
        raise TypeError(f"sinks={sinks!r}: expected a list of callables (step, record)")
    listed = list(sinks)
    for sink in listed:
        if not callable(sink) or isinstance(sink, type):
            raise TypeError(f"sinks: {sink!r} is not a callable (step, record)")
    return listed
