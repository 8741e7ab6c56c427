"""`StabilityMonitor`: measures stability margins during training and sends them to sinks.

Three examples::

    StabilityMonitor(optimizer, model, loss_fn, (x, y), every=50)          # any torch optimizer
    StabilityMonitor(optimizer, model, loss_fn, (x, y), max_overhead=0.05) # 5 % of training time
    with StabilityMonitor(optimizer, Problem.from_batch_loss(model, loss, data), every=10): ...

A monitor is a step hook, a schedule, a measurer and sinks.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.arguments import require_keys
from stableopt._support.torch_internals import eager
from stableopt.curvature.problem.data.layout import BatchDim
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.monitor.joint_step import JointStep, nested
from stableopt.monitor.measurer import Measurer
from stableopt.monitor.observed_step import observe_steps
from stableopt.monitor.sample_counter import SampleCounter
from stableopt.monitor.schedule import Schedule, moved
from stableopt.sinks.delivery import Sink, WarnOnce, check_sinks, deliver, flush
from stableopt.sinks.events import Event, Measured
from stableopt.stability.layers.blocks import Blocks
from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.measure.quantities import DEFAULT_QUANTITIES, QUANTITIES
from stableopt.stability.measure.taken_step import TakenStep
from stableopt.stability.rules.coordinates import problem_of
from stableopt.stability.rules.several import optimizers_in
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["StabilityMonitor"]

_HISTORY = 10_000


class StabilityMonitor:
    r"""Measures the stability margins of a run after steps of any optimizer.

    Training with a monitor is bit for bit the training without it. A measurement that fails, because
    the loss is not finite or by an error, is recorded with its reason and warned of once; training
    continues.

    Args:
        optimizer: the optimizer whose steps count, or a list of those that train the model together,
            such as Muon and AdamW: a step is complete when each has stepped. One that Accelerate
            prepared stands for the optimizer inside. Of an optimizer without torch's step hooks, as of
            a wrapper that only has ``param_groups`` and ``step``, the instance's ``step`` is observed
            until :meth:`close`. If its rule is not known, the monitor says so once, and measures the
            sharpness and the realised edge, which need none.
        model: the model; or a ready :class:`~stableopt.curvature.Problem`, without ``loss_fn`` and
            ``data``.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the probe set, on which curvature is measured: the training set, or a part of it.
        every: measure after every so many steps, such as 50.
        max_overhead: or: measure as often as this share of the training time allows; 0.05 where
            neither is given. A first measurement that is expected to take more than a second waits
            until the training has paid for it.
        batch_size: samples in a step, of all ranks; by default the median of the last five steps, from
            the model's forward passes: not in ``torch.jit.script`` and ``fullgraph=True`` around it.
        dataset_size: samples in the training set, by default those of the probe set.
        quantities: names of :data:`~stableopt.stability.QUANTITIES`, which
            ``docs/reading-margins.md`` lists. Sharpness, the default, comes with the preconditioned one
            where the optimizer has a preconditioner, since its limit is on that, and with the ratio of
            each block where several have no common limit. ``"realised_edge"`` and
            ``"critical_sharpness"`` need no second derivative; they copy the parameters before each
            step that is measured.
        sinks: where measurements go, see :mod:`stableopt.sinks`: callables that take ``(step, record)``.
        update_rule: the rule, or a function of the optimizer that returns it: for optimizers that are
            not known, with their preconditioner if they have one.
        params: the parameters that count; all trainable ones of the model by default.
        chunk_size: the largest number of samples evaluated at once.
        max_samples: the most samples of ``data`` that count, as for ``Problem``. All by default.
        dtype: the precision to measure in, as for ``Problem``: the parameters' own by default.
        sample_weight: the weights of samples in a loss that averages unequally, where they are not
            those of torch's losses; see :class:`~stableopt.curvature.Problem`.
        batch_dim: the dimension that counts the samples, as for ``Problem``: 1 for time-first batches.
        blocks: the blocks of parameters that ``margins.layers`` shows, by default the layers; see
            :func:`~stableopt.measure`.
        process_group: a ``torch.distributed`` group whose ranks measure together, each with its shard
            as ``data``; by default that of a ``DistributedDataParallel`` model, or of one under
            ``fully_shard``. Every rank must then make the monitor: to measure replicas on one rank
            alone, pass ``model.module`` there. Rank 0 decides when to measure, and sends to the sinks.
        tol: the largest residual relative to the eigenvalue.
        max_iter: the largest number of products for each quantity and measurement.
        cold_every: how many measurements warm-start from the last eigenvectors between two that start
            at random.
        spectrum_every: ``"spectrum"`` is measured at one in so many measurements.
        seed: of the eigen-solver's random starts.
        realised_window: over how many measured steps the realised edge is averaged; by default 1 where
            steps take all samples, else 32.

    Attributes:
        optimizers: the optimizers; ``optimizer`` is the first.
        step: steps of the optimizer seen so far.
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
        dataset_size: int | None = None,
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
        quantities = _listed(quantities)
        checked = isinstance(model, MeanLoss) or needs_second_derivatives(quantities)
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
            second_derivatives=None if checked else False,
            process_group=process_group,
        )
        self._counter = SampleCounter(lambda: self.problem.params, problem.layout.dims[0])
        self._warn = WarnOnce(active=problem.ranks.rank == 0)
        self._measurer = Measurer(
            self.optimizers,
            problem,
            self._counter,
            self._warn,
            explicit=params is not None,
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
        self._joint = JointStep(self.optimizers)
        self._taken: TakenStep | None = None
        # Its clock starts now.
        self._schedule = Schedule(every, max_overhead, self._measurer.expected_seconds)

        # Only where a joint step or the parameters before it are needed.
        begins = self._measurer.steps or len(self.optimizers) > 1
        observed = model if isinstance(model, nn.Module) else problem.model
        self._handles: list[Any] = []
        if batch_size is None:
            # This one first: torch.jit modules refuse it, and then no hook must be left behind.
            hook = observed.register_forward_pre_hook(self._counter, with_kwargs=True)
            self._handles.append(hook)
            self._counter.calibrate(problem)
        before = self._before_step if begins else None
        try:
            for each in self.optimizers:
                self._handles += observe_steps(each, before, self._after_step)
        except TypeError:
            self.close()
            raise

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, the first of several."""
        return self.optimizers[0]

    @property
    def margins(self) -> StabilityMargins | None:
        """The latest measurement, a failed one included; ``None`` before the first."""
        return self.history[-1] if self.history else None

    @property
    def problem(self) -> MeanLoss:
        """The problem that is measured; another one once the model's parameters change."""
        return self._measurer.problem

    @property
    def batch_size(self) -> int | None:
        """Samples in a step, as given or observed; ``None`` before the first step.

        Where several ranks train, those of all of them, as of the last measurement.
        """
        return self._measurer.batch_size

    @property
    def update_rule(self) -> UpdateRule:
        """The update rule, read from the optimizer as it stands now."""
        return self._measurer.rule()

    @property
    def eigenvectors(self) -> dict[str, Tensor]:
        """The top eigenvectors ``(d,)`` of the latest measurement by quantity, as far as found.

        They are in the coordinates of the update rule. Where its preconditioner is not part of these,
        as with L-BFGS, it is the covector, whose image by the preconditioner is the eigenvector.
        Those of more than three million parameters are rounded to bfloat16.
        """
        return self._measurer.eigenvectors()

    @property
    def overhead(self) -> float:
        """Time spent measuring, as a share of the time spent training since the monitor began."""
        return self._schedule.overhead

    def count_samples(self, batch: Any) -> None:
        """Count the samples of ``batch`` for the next step, and from now on none of forward passes.

        This is for loops that call parts of the model rather than the model itself.

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

    def measure(self) -> StabilityMargins:
        """Measure now, at any step; record the result and send it to the sinks. On every rank.

        Raises:
            Exception: any error, other than curvature that is not finite.
        """
        return self._record(self._measurer.measure)

    def deliver(self, event: Event) -> None:
        """Send ``event`` to the sinks; a sink that fails is warned of once for each reason."""
        deliver(event, self.sinks, self._warn)

    def _record(self, measure: Callable[[int], Measured]) -> StabilityMargins:
        problem = self.problem
        if problem.device.type == "cuda":
            # The time of work that training has queued is not the measurement's.
            torch.cuda.synchronize(problem.device)
        with self._schedule.timed(self.step):
            event = measure(self.step)
            self.history.append(event.margins)
            self._warn_of(event.margins)
            if problem.ranks.rank == 0:
                self.deliver(event)
        return event.margins

    def _warn_of(self, margins: StabilityMargins) -> None:
        if margins.failure is not None:
            self._warn(f"the measurement at step {margins.step} failed", margins.failure)
        elif margins.failures:
            for name, reason in margins.failures.items():
                self._warn(f"{name} was not measured at step {margins.step}", reason)
        elif not margins.converged:
            reason = f"in {self._measurer.max_iter} products; raise max_iter or tol"
            late = {name for name, its in margins.measurements.items() if not its.converged}
            if late == {"critical_sharpness"}:
                reason = "the bracket of critical_sharpness is wide"
            self._warn(f"the measurement at step {margins.step} did not converge", reason)

    @eager
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if nested(optimizer) or not self._joint.begins(optimizer):
            return
        self._taken = None  # of a step that raised, or that one of several did not complete
        ranks = self.problem.ranks
        if self._measurer.steps and self._schedule.expects(self.step + 1, ranks):
            trail = self._measurer.trail if self._schedule.each_step else None
            self._taken = TakenStep.begins(self._measurer.problem.params, trail)

    @eager
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if nested(optimizer) or not self._joint.ends(optimizer):
            return
        self._counter.end_step()
        self.step += 1
        taken, self._taken = self._taken, None
        recorded = taken is not None or not self._measurer.steps

        def ready() -> bool:
            return recorded and any(moved(optimizer) for optimizer in self.optimizers)

        if self._schedule.turn(self.step, ready, self.problem.ranks):
            self._record(lambda step: self._measurer.measure_or_fail(step, taken))

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows: the page of ``python -m stableopt report`` in short."""
        from stableopt.report import Run, notebook

        try:
            return notebook(Run.of_history(type(self).__name__, self.history))
        except Exception:  # the notebook then shows repr(monitor)
            return None

    def close(self) -> None:
        """Detach from optimizer and model, and flush the sinks; ``history`` remains."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._measurer.trail.end = None
        flush(self.sinks, self._warn)

    def __enter__(self) -> StabilityMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return steps, history and subspaces as plain numbers, lists, dicts and tensors."""
        return {
            "step": self.step,
            "measured": self._measurer.measured,
            "pending": self._schedule.pending,
            "observed": list(self._counter.observed),
            "starts": dict(self._measurer.starts),
            "memory": copy.deepcopy(self._measurer.memory),
            "history": [margins.to_dict() for margins in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            ValueError: if something is missing, or its subspaces are not of this model's size.
        """
        require_keys(state, self.state_dict().keys() - {"memory"})  # which older versions lack
        # Nothing changes before all of it has been read.
        starts = self._measurer.checked(state["starts"])
        history = [StabilityMargins.from_dict(margins) for margins in state["history"]]
        self.step, self.history = state["step"], deque(history, maxlen=_HISTORY)
        self._measurer.measured, self._measurer.starts = state["measured"], starts
        self._measurer.memory = copy.deepcopy(dict(state.get("memory", {})))
        self._schedule.restore(pending=bool(state["pending"]))
        self._counter.observed.clear()
        self._counter.observed.extend(state["observed"])


def _listed(quantities: Iterable[str]) -> Iterable[str]:
    """Return quantities that can be read twice, DEFAULT_QUANTITIES itself where they are these."""
    once = isinstance(quantities, Iterator)
    return tuple(quantities) if once else quantities


def needs_second_derivatives(quantities: Iterable[str]) -> bool:
    """Return whether one of ``quantities`` takes more than losses and gradients."""
    listed = quantities if isinstance(quantities, Iterable) else ()
    known = [QUANTITIES[name] for name in listed if name in QUANTITIES]
    return not known or not all(quantity.first_order for quantity in known)
