"""`StabilityMonitor`: measures stability margins during training and sends them to sinks.

Three examples::

    StabilityMonitor(optimizer, model, loss_fn, (x, y), every=50)          # any torch optimizer
    StabilityMonitor(optimizer, model, loss_fn, (x, y), max_overhead=0.05) # 5 % of training time
    with StabilityMonitor(optimizer, Problem.from_batch_loss(model, loss, data), every=10): ...

A monitor combines a step hook, a :class:`~stableopt.monitor.schedule.Schedule`, a
:class:`~stableopt.monitor.measurer.Measurer` and sinks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.arguments import require_keys
from stableopt._support.torch_internals import eager
from stableopt._support.warn_once import WarnOnce
from stableopt.curvature.problem.data.layout import BatchDim
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.monitor.measurer import Measurer, needs_second_derivatives
from stableopt.monitor.observed_step import observe_steps
from stableopt.monitor.sample_counter import SampleCounter
from stableopt.monitor.schedule import Schedule, step_moved
from stableopt.sinks.delivery import Sink, check_sinks, deliver, flush
from stableopt.sinks.events import Event, Measured
from stableopt.stability.layers.blocks import Blocks
from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.measure.registry import DEFAULT_QUANTITIES
from stableopt.stability.measure.taken_step import TakenStep
from stableopt.stability.rules.ascent import note_ascent
from stableopt.stability.rules.coordinates import problem_of
from stableopt.stability.rules.several import optimizers_in
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["StabilityMonitor"]

_HISTORY = 10_000


class StabilityMonitor:
    r"""Measures the stability margins of a run after steps of any optimizer.

    Training with a monitor is bit for bit the training without it. If a measurement fails, by an error
    or at a loss that is not finite, the monitor records the reason and warns once; training continues.

    Args:
        optimizer: the optimizer to watch, or a list of optimizers that train the model together, such
            as Muon and AdamW: a step is complete when each has stepped. For one prepared by Accelerate,
            the optimizer inside is read. If it lacks torch's step hooks, such as a wrapper with only
            ``param_groups`` and ``step``, the instance's ``step`` is wrapped until :meth:`close`. If
            its update rule is not known, the monitor warns once, and measures the sharpness and the
            realised edge, which need no rule.
        model: the model; or a :class:`~stableopt.curvature.Problem`, without ``loss_fn`` and ``data``.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the probe set, on which curvature is measured: the training set, or a part of it.
        every: the number of steps between measurements, such as 50.
        max_overhead: instead of ``every``, the largest share of the training time spent measuring; 0.05
            if neither is given. A first measurement that is expected to take more than a second waits
            until the training time allows it.
        batch_size: samples in a step, of all ranks. By default the median of the last five steps,
            counted in the model's forward passes, except under ``torch.jit.script``, with
            ``fullgraph=True`` around the model, if compiled code of the model has already run, or for
            a batch loss under ``fully_shard``.
        dataset_size: samples in the training set, by default those of the probe set; or ``math.inf``.
        quantities: names of :data:`~stableopt.stability.QUANTITIES`, listed in
            ``docs/reading-margins.md``. The default, sharpness, adds the preconditioned sharpness if
            the optimizer has a preconditioner, since the limit is on it, and the edge ratio of each
            block if several optimizers have no common limit. ``"realised_edge"`` and
            ``"critical_sharpness"`` need no second derivative; they copy the parameters before each
            measured step.
        sinks: callables that receive ``(step, record)``, see :mod:`stableopt.sinks`.
        update_rule: the rule, or a function that returns it given the optimizer: for optimizers that
            stableopt does not know, with their preconditioner if they have one.
        params: the parameters to measure; by default all trainable ones of the model.
        chunk_size: the largest number of samples evaluated at once.
        max_samples: the largest number of samples of ``data`` to use; by default all.
        dtype: the precision to measure in, as for ``Problem``; by default that of the parameters.
        sample_weight: the weights of the samples, for a loss that averages with weights and is not
            one of torch's; see :class:`~stableopt.curvature.Problem`.
        batch_dim: the dimension that counts the samples, as for ``Problem``: 1 for time-first batches.
        blocks: the blocks of parameters in ``margins.layers``, by default the layers; see
            :func:`~stableopt.measure`.
        process_group: a ``torch.distributed`` group whose ranks measure together, each with its shard
            as ``data``; by default the group of a ``DistributedDataParallel`` model or of a model under
            ``fully_shard``. Every rank must then create the monitor; to measure replicas on one rank
            alone, pass ``model.module`` there. Rank 0 decides when to measure, and sends to the sinks.
        tol: the largest residual, relative to the eigenvalue.
        max_iter: the largest number of products for each quantity and measurement.
        cold_every: the number of warm-started measurements between two that start at random.
        spectrum_every: the number of measurements from one ``"spectrum"`` to the next.
        seed: seed of the eigen-solver's random starts.
        realised_window: the number of measured steps over which the realised edge is averaged; by
            default 1 for full-batch steps, else 32.

    Attributes:
        optimizers: the optimizers; ``optimizer`` is the first.
        step: the number of steps so far.
        history: the latest 10,000 :class:`StabilityMargins`, oldest first.
        sinks: the sinks, as a list.

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
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        model: nn.Module | MeanLoss,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        data: Any = None,
        *,
        every: int | None = None,
        max_overhead: float | None = None,
        batch_size: int | None = None,
        dataset_size: float | None = None,
        quantities: Iterable[str] = DEFAULT_QUANTITIES,
        sinks: Iterable[Sink] = (),
        update_rule: UpdateRule | Callable[[Any], UpdateRule] | None = None,
        params: Iterable[Tensor] | None = None,
        chunk_size: int | None = None,
        max_samples: int | None = None,
        dtype: torch.dtype | None = None,
        sample_weight: Tensor | Callable[[Any], Tensor] | None = None,
        batch_dim: BatchDim | None = None,
        blocks: Blocks | None = None,
        process_group: Any = None,
        tol: float = 0.03,
        max_iter: int = 50,
        cold_every: int = 20,
        spectrum_every: int = 20,
        seed: int = 0,
        realised_window: int | None = None,
    ) -> None:
        self.optimizers = optimizers_in(optimizer)
        self.sinks = check_sinks(sinks)
        quantities = tuple(quantities) if isinstance(quantities, Iterator) else quantities
        check_derivatives = isinstance(model, MeanLoss) or needs_second_derivatives(quantities)
        problem = problem_of(
            model,
            loss_fn,
            data,
            params=params,
            chunk_size=chunk_size,
            max_samples=max_samples,
            dtype=dtype,
            sample_weight=sample_weight,
            batch_dim=batch_dim,
            second_derivatives=None if check_derivatives else False,
            process_group=process_group,
        )
        self._warn = WarnOnce(active=problem.ranks.rank == 0)
        self._counter = SampleCounter(
            lambda: self.problem.params, problem.layout.dims[0], self._warn
        )
        self._measurer = Measurer(
            self.optimizers,
            problem,
            self._counter,
            self._warn,
            update_rule=update_rule,
            quantities=quantities,
            batch_size=batch_size,
            dataset_size=dataset_size,
            tol=tol,
            max_iter=max_iter,
            cold_every=cold_every,
            seed=seed,
            window=realised_window,
            spectrum_every=spectrum_every,
            blocks=blocks,
        )
        self.quantities = self._measurer.quantities
        self.step = 0
        self.history: deque[StabilityMargins] = deque(maxlen=_HISTORY)
        self._step_start: TakenStep | None = None
        # The schedule's clock starts here.
        self._schedule = Schedule(every, max_overhead, self._measurer.expected_seconds)
        self._handles: list[Any] = []
        if batch_size is None:
            # First of all hooks: torch.jit modules refuse it, and then no other hook remains.
            module = model if isinstance(model, nn.Module) else problem.model
            self._handles.append(module.register_forward_pre_hook(self._counter, with_kwargs=True))
        before = self._before_step if self._measurer.needs_steps else None
        at_ascent = self._warn.guarded("the gradient before SAM's ascent was not read", note_ascent)
        try:
            self._handles += observe_steps(self.optimizers, before, self._after_step, at_ascent)
            if batch_size is None:
                self._counter.calibrate(problem)
        except Exception:
            self.close()
            raise

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, the first of several."""
        return self.optimizers[0]

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called: the monitor then sees no further step."""
        return not self._handles

    @property
    def margins(self) -> StabilityMargins | None:
        """The latest measurement, a failed one included; ``None`` before the first."""
        return self.history[-1] if self.history else None

    @property
    def problem(self) -> MeanLoss:
        """The measured problem; a new one after the model's trainable parameters change."""
        return self._measurer.problem

    @property
    def batch_size(self) -> int | None:
        """Samples in a step, as given or observed; ``None`` before the first step.

        With several ranks it is their sum at the last measurement.
        """
        return self._measurer.batch_size

    @property
    def update_rule(self) -> UpdateRule:
        """The update rule, read from the optimizer's present state."""
        return self._measurer.rule()

    @property
    def eigenvectors(self) -> dict[str, Tensor]:
        """The top eigenvectors ``(d,)`` of the latest ``"sharpness"`` and its like, by quantity.

        Those of ``"preconditioned_sharpness"`` and ``"non_uniformity"`` are in the update rule's
        coordinates. If P is not diagonal, as with L-BFGS, they are covectors: P times a covector is the
        eigenvector. Above three million parameters they are rounded to bfloat16.
        """
        return self._measurer.eigenvectors()

    @property
    def overhead(self) -> float:
        """Time spent measuring over time spent training, since the monitor was created."""
        return self._schedule.overhead

    def count_samples(self, batch: Any) -> None:
        """Count the samples of ``batch`` for the next step, and stop counting in forward passes.

        Call it in loops that call parts of the model rather than the model itself.

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
        self._counter.count_only(batch)

    def measure(self, *, aside: bool = False) -> StabilityMargins:
        """Measure now, record the result and send it to the sinks; call it on every rank.

        Args:
            aside: send it to the sinks only: history, steering and later measurements do not see it.

        Raises:
            Exception: any error except a loss or curvature that is not finite.
        """
        if not aside:
            return self._record(self._measurer.measure)
        with self._measurer.undone():
            return self._record(self._measurer.measure, in_history=False)

    def deliver(self, event: Event) -> None:
        """Send ``event`` to the sinks; warn once for each reason why a sink fails."""
        deliver(event, self.sinks, self._warn)
        if self.closed:  # by a sink, which flushed those that got the event after it too early
            flush(self.sinks, self._warn)

    def close_together(self) -> None:
        """Close on every rank if a sink of rank 0 has closed the monitor; every rank must call it."""
        if self.problem.ranks.any(self.closed) and not self.closed:
            self.close()

    def _record(
        self, measure: Callable[[int], Measured], *, in_history: bool = True
    ) -> StabilityMargins:
        problem = self.problem
        if problem.device.type == "cuda":
            # Kernels that training has queued do not count as measuring time.
            torch.cuda.synchronize(problem.device)
        with self._schedule.timed():
            event = measure(self.step)
            if in_history:
                self.history.append(event.margins)
            self._measurer.warn_of(event.margins)
            if problem.ranks.rank == 0:
                self.deliver(event)
            self.close_together()
        return event.margins

    @eager
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._step_start = None  # drops that of a step that raised or remained incomplete
        ranks = self.problem.ranks
        if self._schedule.may_measure(self.step + 1, ranks):
            cache = self._measurer.step_end_cache if self._schedule.each_step else None
            self._step_start = TakenStep.begin(self._measurer.problem.params, cache)

    @eager
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._counter.end_step()
        self.step += 1
        taken_step, self._step_start = self._step_start, None
        measurable = taken_step is not None or not self._measurer.needs_steps

        def moved() -> bool:
            return measurable and any(step_moved(optimizer) for optimizer in self.optimizers)

        if self._schedule.should_measure(self.step, moved, self.problem.ranks):
            self._record(lambda step: self._measurer.measure_or_fail(step, taken_step))

    def _repr_html_(self) -> str | None:
        """Return a short form of the page of ``python -m stableopt report``, for notebooks."""
        from stableopt.report import Run, notebook

        try:
            return notebook(Run.of_history(type(self).__name__, self.history))
        except Exception:  # notebooks then show repr(monitor)
            return None

    def close(self) -> None:
        """Remove the hooks from optimizer and model, and flush the sinks; keep ``history``.

        Every rank must call it. If a sink of rank 0 calls it, the monitor closes on all ranks.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._measurer.forget_step()
        flush(self.sinks, self._warn)

    def __repr__(self) -> str:
        state = "closed, " if self.closed else ""
        names = [type(optimizer).__name__ for optimizer in self.optimizers]
        return (
            f"<StabilityMonitor of {', '.join(names)}: {state}step {self.step:,}, {self.problem!r}>"
        )

    def __enter__(self) -> StabilityMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return steps, history and subspaces as plain numbers, lists, dicts and tensors."""
        return {
            "step": self.step,
            "pending": self._schedule.pending,
            "observed": list(self._counter.observed),
            **self._measurer.state_dict(),
            "history": [margins.to_dict() for margins in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            Exception: ``ValueError`` if a key is missing, or the subspaces do not have this model's
                size; or any error over an entry of a wrong kind. The monitor then stays as it was.
        """
        require_keys(state, ("step", "pending", "observed", "measured", "starts", "history"))
        # Read everything that can raise before changing anything.
        step, tracking = int(state["step"]), self._measurer.read_state(state)
        history = [StabilityMargins.from_dict(margins) for margins in state["history"]]
        observed = [int(samples) for samples in state["observed"]]
        self.step, self.history = step, deque(history, maxlen=_HISTORY)
        self._measurer.restore(tracking)
        self._schedule.restore(pending=bool(state["pending"]))
        self._counter.restore(observed)
