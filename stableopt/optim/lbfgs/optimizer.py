"""`LBFGS`: limited-memory BFGS with the interface and results of torch, safe at non-finite losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from stableopt._support.arguments import shown, whole
from stableopt._support.torch_internals import eager
from stableopt._support.warn_once import WarnOnce
from stableopt.optim.lbfgs.compact import CompactPairs
from stableopt.optim.lbfgs.iterations import Iterations, StepEnd
from stableopt.optim.lbfgs.memory import PairMemory
from stableopt.optim.lbfgs.objective import FlatKind, Objective, flat_kind
from stableopt.optim.lbfgs.two_loop import TwoLoopPairs
from stableopt.optim.trackable import Tracking

__all__ = ["LBFGS"]

DIRECTIONS = ("compact", "two_loop")

GROUP_OPTIONS = ("params", "param_names", "lr", "initial_lr", "weight_decay")
"""Options in which groups may differ; schedulers add ``initial_lr``."""

MEMORY_KEYS = ("old_dirs", "old_stps", "ro", "H_diag", "al", "compact")


class LBFGS(Tracking, torch.optim.LBFGS):
    r"""``torch.optim.LBFGS`` with ``track`` and ``margins``: same arguments and defaults.

    A step takes up to ``max_iter`` iterations :math:`x \leftarrow x - tPg`, where P is the inverse
    Hessian of the last ``history_size`` pairs (Liu & Nocedal, 1989).

    ``direction="two_loop"`` has torch's arithmetic, bit for bit if losses and gradients are finite.
    ``"compact"`` applies the same matrix, up to rounding, in a few large products
    (:class:`~stableopt.curvature.InverseHessian`). It takes two host transfers an iteration, and one for
    each trial of a line search; torch takes about twenty an iteration with ten pairs, and two hundred
    with a hundred. State dicts can be loaded from torch and by torch.

    Differences from torch:

    - A loss or a gradient that is not finite shortens the step; torch lengthens it. Without a finite
      point in ``max_eval`` calls, the parameters return to the start of the step and the memory is
      emptied; parameters never stay non-finite. The last fixed step of a call is not evaluated; if its
      loss is not finite, the next call shortens it.
    - ``"compact"`` keeps a pair if :math:`y^\top s > \epsilon\|y\|\|s\|` and neither
      :math:`y^\top s` nor :math:`y^\top y` underflows, at any scale of the loss. ``"two_loop"`` keeps it
      if :math:`y^\top s > 10^{-10}`, like torch.
    - If losses differ by less than rounding, the line search of ``"compact"`` compares slopes, and ends
      between points that round to the same one; torch continues up to ``max_eval``. After such a search
      without a lower point, the next step evaluates once and does not search again.
    - A direction that does not descend empties the memory; torch would never move again.
    - Groups may have their own ``lr`` and ``weight_decay``. With
      :math:`\Lambda = \mathrm{diag}(\eta_g)/\max\eta` the direction is
      :math:`-\Lambda^{1/2}P\Lambda^{1/2}g`, a descent direction for all rates.
    - In half precision ``"compact"`` sums inner products in float32, so that they do not overflow.
    - Copies and pickles work, and so does a state that other tools write, clear or cast.

    Memory: ``2 history_size + 8`` vectors of the parameters' size in addition to parameters and
    gradients: the pairs, the direction, two gradients, a gradient change with a copy of the gradient,
    the start of a move, and up to two more gradients in a line search. ``"compact"`` allocates most of
    them at the first pair. ``"two_loop"`` needs about four more for temporaries, torch nine more.

    Args:
        params: parameters, or groups of them, all on one device.
        lr: the step length without a line search; with one, the first length to try.
        max_iter: the largest number of iterations in a step.
        max_eval: the largest number of closure calls in a step, by default 5/4 ``max_iter``.
        tolerance_grad: a step ends if the largest absolute entry of the gradient is at most this.
        tolerance_change: a step ends if the loss or the parameters change by less than this.
        history_size: the largest number of pairs in the memory.
        line_search_fn: ``"strong_wolfe"``, or ``None`` for steps of fixed length.
        direction: ``"compact"`` or ``"two_loop"``.
        damping: averages y with :math:`s/\gamma`, that of the initial matrix, in pairs of too little
            curvature, instead of dropping them
            (:func:`~stableopt.optim.lbfgs.memory.damped_share`). Powell's value is 0.2; the default,
            0, is off.
        weight_decay: coupled weight decay: adds :math:`\lambda x` to the gradient, and
            :math:`\lambda\|x\|^2/2` to the loss that a line search compares.
        maximize: maximize the loss.
        reduce_loss: maps the detached loss to the number to compare, such as the mean over the ranks.
            Needed if ranks average gradients but not losses, since their decisions would differ.

    The closure should be deterministic, since a step compares losses and gradients of its calls. If the
    first call of a step returns another loss than the last call of the step before, at the same point, a
    warning says so once. The check costs no call. Without ``line_search_fn`` a step of ``max_iter``
    iterations does not evaluate its end, and there is nothing to compare.

    Raises:
        ValueError: for values out of range, and for groups that differ in other options.

    >>> x = torch.nn.Parameter(torch.tensor([-1.2, 1.0]))
    >>> optimizer = LBFGS([x], line_search_fn="strong_wolfe", max_iter=100)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item() > 24
    True
    >>> x.detach().round(decimals=3)
    tensor([1., 1.])
    """

    # A gradient scaler then sets attributes, by which `step` detects it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        direction: Literal["compact", "two_loop"] = "compact",
        damping: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        reduce_loss: Callable[[Tensor], Any] | None = None,
    ) -> None:
        max_iter = whole("max_iter", max_iter, least=0)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
            "direction": direction,
            "damping": damping,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        _check_options(defaults)
        self.reduce_loss = reduce_loss
        self._reset_caches()
        # The constructor of torch.optim.LBFGS refuses a second group.
        torch.optim.Optimizer.__init__(self, params, defaults)

    def _reset_caches(self) -> None:
        """Drop all that is not in the state; it is rebuilt from the state, or not needed."""
        self._memory: PairMemory | None = None
        self._memory_owner: tuple[dict[str, Any] | None, Any] = None, None
        self._last_end: StepEnd | None = None
        self._warn = WarnOnce()

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``lr`` and ``weight_decay``.

        This empties the memory, whose pairs lack the new parameters.
        """
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1])
            _check_groups(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        inherited = super().__getstate__()
        return {**inherited, "state": self._exported_state(), "reduce_loss": self.reduce_loss}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Optimizer.__setstate__ adds "differentiable", a key that a new optimizer does not have.
        for options in (self.defaults, *self.param_groups):
            options.pop("differentiable", None)
        self._reset_caches()
        self.__dict__.setdefault("reduce_loss", None)
        for group in self.param_groups:
            # Checkpoints of torch.optim.LBFGS lack the options of this class.
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's format, as copies that further training does not change."""
        live, self.state = self.state, self._exported_state()
        try:
            return super().state_dict()
        finally:
            self.state = live

    def _exported_state(self) -> Any:
        """Return a copy of the state that includes the memory."""
        exported = self.state.copy()
        for p, state in self.state.items():
            state = dict(state)
            if self._memory is not None and self._memory_owner[0] is self.state[p]:
                state = self._with_memory(state)
                if "compact" in state:
                    state["compact"]["func_evals"] = state["func_evals"]
            exported[p] = {name: _deep_clone(value) for name, value in state.items()}
        return exported

    def _with_memory(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the memory's entries, updated by ``state``, into which others may have written."""
        assert self._memory is not None
        exported = self._memory.export()
        if any(name in state for name in MEMORY_KEYS):
            exported.pop("compact", None)  # its products belong to the former pairs
        return {**exported, **state}

    @torch.no_grad()
    def inverse_hessian_matvec(self, vectors: Tensor) -> Tensor:
        r"""Return P times ``vectors``, with the inverse Hessian P of the last direction.

        P excludes learning rates: a step is :math:`-t\Lambda^{1/2}P\Lambda^{1/2}g`. Without pairs, P
        is the identity.

        Args:
            vectors: ``(d,)`` or ``(d, k)``, in the order of the flattened parameters of all groups;
                complex parameters are pairs of real numbers.

        Raises:
            ValueError: for another shape.
        """
        params = self._params
        kind = flat_kind(params)
        size = 0 if kind is None else kind.size
        if vectors.dim() not in (1, 2) or len(vectors) != size:
            raise ValueError(
                f"vectors has shape {tuple(vectors.shape)}: expected ({size},) or ({size}, k)"
            )
        if kind is None or params[0] not in self.state:
            return vectors.clone()
        return self._pairs(self.state[params[0]], kind).matvec(vectors)

    def _pairs(self, state: dict[str, Any], kind: FlatKind) -> PairMemory:
        """Return the memory, rebuilt from the state after a checkpoint or a change of options."""
        options = self.param_groups[0]
        memory_type: type[CompactPairs | TwoLoopPairs]
        memory_type = CompactPairs if options["direction"] == "compact" else TwoLoopPairs
        capacity, (owner, memory_kind) = options["history_size"], self._memory_owner
        # Other tools may have replaced the state, or written parts of it.
        memory = self._memory if owner is state else None
        written = any(name in state for name in MEMORY_KEYS)
        former = state.get("prev_flat_grad")
        if former is not None and (len(former), former.dtype, former.device) != kind:
            # Parameters were added, cast or moved.
            for name in ("d", "t", "prev_flat_grad", "prev_loss", *MEMORY_KEYS):
                state.pop(name, None)
            state["n_iter"], memory = 0, None
        elif memory is not None:
            same_options = type(memory) is memory_type and memory.capacity == capacity
            if same_options and not written and memory_kind == kind:
                return memory
            state.update(self._with_memory(state))
        for name in ("old_dirs", "old_stps", "ro"):
            if state.get(name):
                state[name] = [_as_kind(value, kind) for value in state[name]]
        memory = memory_type(capacity, state)
        self._memory, self._memory_owner = memory, (state, kind)
        for name in MEMORY_KEYS:
            state.pop(name, None)
        return memory

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, of up to ``max_iter`` iterations.

        Args:
            closure: zeroes the gradients, computes the loss and its gradients, and returns the loss.

        Returns:
            The first return value of the closure.

        Raises:
            TypeError: without a closure.
            RuntimeError: under a gradient scaler.
        """
        if hasattr(self, "grad_scale"):
            # The scaler would remove these after the step.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise RuntimeError(
                "LBFGS cannot step under a GradScaler: it calls its closure several times, and the"
                " scale belongs to one gradient. Call step(closure) without the scaler; bfloat16"
                " autocast needs none"
            )
        if not callable(closure):
            raise TypeError(
                f"closure={shown(closure)}: expected a function that zeroes the gradients, computes the"
                " loss and its gradients, and returns the loss: LBFGS calls it several times a step"
            )
        kind = flat_kind(self._params)
        if kind is None:
            return closure()
        objective = Objective(closure, self.param_groups, self.reduce_loss)
        state = self.state[objective.params[0]]
        state.setdefault("func_evals", 0)
        state.setdefault("n_iter", 0)
        memory = self._pairs(state, kind)
        rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
        rates = [rate.squeeze() if isinstance(rate, Tensor) else rate for rate in rates]
        iterations = Iterations(
            objective, self.param_groups[0], rates, state, memory, self._last_end, self._warn
        )
        self._last_end = None
        try:
            self._last_end = iterations.run()
        finally:
            state["func_evals"] += objective.evaluations
        return objective.first_returned


def _as_kind(value: Any, kind: FlatKind) -> Any:
    """Return a tensor in the dtype and on the device of ``kind``; other values unchanged."""
    return value.to(kind.device, kind.dtype) if isinstance(value, Tensor) else value


def _deep_clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [_deep_clone(part) for part in value] if isinstance(value, list) else value


def _check_options(options: dict[str, Any]) -> None:
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has {lr.numel()} elements: Tensor lr must be 1-element")
    for name in ("lr", "weight_decay"):
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"{name}={options[name]!r}: expected a number of at least 0")
    if not 0 <= options["damping"] < 1:
        raise ValueError(f"damping={options['damping']!r}: expected a number from 0 to below 1")
    whole("max_iter", options["max_iter"], least=0)
    whole("max_eval", options["max_eval"], least=0)
    whole("history_size", options["history_size"])
    for name in ("tolerance_grad", "tolerance_change"):
        if math.isnan(options[name]):
            raise ValueError(f"{name}={options[name]!r}: expected a number")
    if options["line_search_fn"] not in (None, "strong_wolfe"):
        raise ValueError(
            f"line_search_fn={options['line_search_fn']!r}: expected 'strong_wolfe' or None"
        )
    if options["direction"] not in DIRECTIONS:
        raise ValueError(f"direction={options['direction']!r}: expected one of {DIRECTIONS}")


def _check_groups(groups: list[dict[str, Any]]) -> None:
    for name, value in groups[0].items():
        if name in GROUP_OPTIONS:
            continue
        for group in groups[1:]:
            if group.get(name, value) != value:
                raise ValueError(
                    f"param_groups have {name} {value!r} and {group[name]!r}: expected one value;"
                    " groups may differ in lr and weight_decay only"
                )
