r"""Model, loss and data seen as one function of one flat parameter vector.

.. math:: f(\theta) = \frac1n \sum_{i=1}^n f_i(\theta)

Every operator of this package takes a :class:`Problem`. It knows how to read the data, how to call
the model at other parameters than its own, and how a flat vector ``(d,)`` maps to the parameters'
shapes. It never changes the model, its gradients or its random state.

Three examples::

    Problem(model, nn.MSELoss(), (x, y))                        # two tensors
    Problem(model, nn.CrossEntropyLoss(), loader, chunk_size=64)  # bounded memory
    Problem.from_batch_loss(model, lambda model, batch: model(**batch).loss, batches)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.curvature.errors import SecondDerivativeError
from stableopt.curvature.isolation.isolated import undisturbed
from stableopt.curvature.isolation.plain_kernels import NOTES, UNCOMPILED, AttentionSeen, compiled
from stableopt.curvature.problem.coordinates import _checked_scale, _scaled
from stableopt.curvature.problem.data import Batches, cut, generators_of, map_tensors
from stableopt.curvature.problem.derivative_checks import (
    check_gradient,
    check_symmetry,
    differentiate_twice,
    module_without_second_derivative,
)
from stableopt.curvature.problem.fsdp import mesh_of
from stableopt.curvature.problem.loss_checks import (
    CHECKED_SAMPLES,
    check_mean,
    check_replicas,
    checked_scalar,
    checked_weights,
    twice_over,
)
from stableopt.curvature.problem.parameters import check_batch_norm, select_parameters, unwrapped
from stableopt.curvature.problem.precision import Precision
from stableopt.distributed import Ranks

__all__ = ["Choices", "Problem", "Theta"]

Theta = tuple[Tensor, ...]
"""One value of the parameters: a tensor for each, in the problem's order."""


class Choices(NamedTuple):
    """What the user chose of how to evaluate."""

    dtype: torch.dtype | None
    batch_statistics: bool


class _Objective(nn.Module):
    """A model and its loss as one module, so that one functional call swaps all parameters."""

    def __init__(
        self, model: nn.Module, batch_loss: Callable[[nn.Module, Any], Tensor], loss_fn: Any
    ) -> None:
        super().__init__()
        self.model = model
        self.batch_loss = batch_loss
        if isinstance(loss_fn, nn.Module):
            # Its mode and buffers are then kept like the model's. A loss that is bound to the
            # model, or a part of it, is there already.
            self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.batch_loss(self.model, batch)


class Problem:
    r"""The mean loss of ``model`` on ``data`` as a function of the flat parameter vector.

    Args:
        model: any module. A compiled module is measured as the module it was compiled from.
        loss_fn: ``loss_fn(model(x), y)``, a scalar, the *mean* over the samples of a batch.
        data: an ``(x, y)`` pair, a ``Dataset`` or ``DataLoader`` of such pairs, or any re-iterable
            of batches (see :class:`~stableopt.curvature.problem.data.Batches`). Batches are moved to the
            model's device; a ragged last batch weighs what it holds.
        params: the parameters that count, d in number; all trainable ones of ``model`` by default.
        chunk_size: the most samples evaluated at once. Less memory, the same result.
        dtype: the precision to evaluate in, that of the parameters by default: ``torch.float32`` or
            ``torch.float64``, to which parameters, buffers and data are cast, or ``torch.bfloat16``
            or ``torch.float16`` for a forward pass under autocast.
        batch_statistics: whether batch norm normalises by the statistics of each batch, as in
            training, in place of its running ones. Then f is the mean of the batches' losses, the
            batches being those of ``data``, cut at ``chunk_size``; samples have no curvature of
            their own.
        process_group: a ``torch.distributed`` group whose ranks measure together: ``data`` is then
            this rank's shard, and every product one all-reduce. Every rank must make the problem, and
            use it, alike. By default this process is alone, also with a
            ``DistributedDataParallel`` model.

    Attributes:
        obstacle: why the model cannot be differentiated twice, or ``None``: its Hessian then goes by
            central differences, on all ranks.

    Raises:
        ValueError: for a loss that is not a scalar, or not a mean over samples (found by doubling
            a batch), for one of which the gradient is not the derivative, for empty data, or
            parameters on several devices or of several dtypes, or that are not the same on all ranks.
        TypeError: for data that can be read only once, or parameters that are not real
            floating-point numbers of single or double precision.
        RuntimeError: for a model that cannot be differentiated even once.
        LostRankError: where another rank has ended, or does not answer within the group's timeout.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> problem = Problem(model, nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
    >>> problem.num_params, problem.num_samples
    (2, 4)
    """

    sharded = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Iterable[Tensor] | None = None,
        chunk_size: int | None = None,
        dtype: torch.dtype | None = None,
        batch_statistics: bool = False,
        process_group: Any = None,
    ) -> None:
        if not callable(loss_fn) or isinstance(loss_fn, type):
            raise TypeError(f"loss_fn={loss_fn!r}: expected a function of outputs and targets")
        self.loss_fn: Callable[[Any, Any], Tensor] | None = loss_fn

        def batch_loss(model: nn.Module, batch: Any) -> Tensor:
            x, y = batch
            return loss_fn(model(x), y)

        choices, ranks = Choices(dtype, batch_statistics), Ranks(process_group)
        self._set_up(model, batch_loss, data, params, chunk_size, choices, ranks, paired=True)

    @classmethod
    def from_batch_loss(
        cls,
        model: nn.Module,
        batch_loss: Callable[[nn.Module, Any], Tensor],
        data: Any,
        *,
        params: Iterable[Tensor] | None = None,
        chunk_size: int | None = None,
        dtype: torch.dtype | None = None,
        batch_statistics: bool = False,
        process_group: Any = None,
    ) -> Problem:
        """Make a problem of ``batch_loss(model, batch)``, the mean loss of one batch of any form.

        For batches that are dictionaries, and models that compute their own loss. ``data`` is one
        batch, or a re-iterable of batches; every tensor of a batch counts its samples in its first
        dimension. The other arguments, and the errors, are those of the class.

        >>> model = nn.Linear(2, 1)
        >>> batch = {"x": torch.ones(4, 2)}
        >>> loss = lambda model, batch: model(batch["x"]).square().mean()
        >>> Problem.from_batch_loss(model, loss, batch).num_samples
        4
        """
        problem = cls.__new__(cls)
        problem.loss_fn = None
        choices, ranks = Choices(dtype, batch_statistics), Ranks(process_group)
        problem._set_up(model, batch_loss, data, params, chunk_size, choices, ranks, paired=False)
        return problem

    def _set_up(
        self,
        model: nn.Module,
        batch_loss: Callable[[nn.Module, Any], Tensor],
        data: Any,
        params: Iterable[Tensor] | None,
        chunk_size: int | None,
        choices: Choices,
        ranks: Ranks,
        *,
        paired: bool,
    ) -> None:
        self.ranks = ranks
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r}: expected a torch.nn.Module")
        self.model = unwrapped(model)
        if not self.sharded and mesh_of(self.model) is not None:
            raise TypeError(
                "model is under fully_shard: expected a ShardedProblem, as measure() and track() make"
            )
        self._objective = _Objective(self.model, batch_loss, self.loss_fn)
        self._choices = choices
        self.obstacle: SecondDerivativeError | None = None
        self._notes = {UNCOMPILED} if compiled(model) else set()
        if not choices.batch_statistics:
            check_batch_norm(self.model)
        self._all_trainable = params is None
        self._moved: frozenset[str] = frozenset()
        self.equal_weights = True
        self._take(*select_parameters(self.model, params))
        # What one rank's data are refused for is an error on all.
        ranks.raise_together(lambda: self._read(data, chunk_size, paired=paired))
        if ranks.several:
            self._num_samples = sum(ranks.all_gather_object(self.own_samples))
            self.equal_weights = not ranks.any(not self.equal_weights)
            self._share_obstacle()
        self._check_together()

    def _read(self, data: Any, chunk_size: int | None, *, paired: bool) -> None:
        # Even to see whether there are data draws random numbers: a loader's iterator takes a seed.
        with self._undisturbed(data):
            self.batches = Batches(data, chunk_size=chunk_size, paired=paired)
        self._check()

    def transformed(
        self,
        *,
        sign: float = 1.0,
        scale: Sequence[Tensor | float] | None = None,
        weight_decay: Sequence[float] | None = None,
    ) -> Problem:
        r"""Return the problem in other coordinates, as an optimizer with several groups sees it.

        .. math:: g(y) = \pm f(\theta_0 + D y) + \tfrac12 \|\Lambda^{1/2} D y\|^2

        so that the Hessian becomes :math:`D(\pm H + \Lambda)D`: with :math:`D^2 = P` a diagonal
        preconditioner (per-group learning rates), :math:`\Lambda` coupled weight decay that differs
        between groups, and a minus sign for ``maximize``.

        Args:
            sign: 1, or -1 to look at -f.
            scale: for each parameter a factor, or a tensor of its shape: the diagonal of D.
            weight_decay: a coefficient for each parameter, the diagonal of Lambda.

        >>> model = nn.Linear(2, 1)
        >>> problem = Problem(model, nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
        >>> problem.transformed(scale=[2.0, 1.0]).flatten([torch.ones(1, 2), torch.ones(1)])
        tensor([2., 2., 1.])
        """
        other = copy.copy(self)
        other.sign = sign
        for name, values in (("scale", scale), ("weight_decay", weight_decay)):
            if values is not None and len(values) != len(self.params):
                raise ValueError(
                    f"{name} has {len(values)} values: expected one for each of the"
                    f" {len(self.params)} parameters"
                )
        if scale is not None:
            other.scale = tuple(
                _checked_scale(name, factor, shape)
                for name, factor, shape in zip(self.names, scale, self.shapes, strict=True)
            )
        else:
            other.scale = (1.0,) * len(self.params)
        other.weight_decay = (
            (0.0,) * len(self.params) if weight_decay is None else tuple(weight_decay)
        )
        return other

    def without_weight_decay(self) -> Problem:
        """Return the problem in the same coordinates without the term of the weight decay."""
        return self.transformed(sign=self.sign, scale=self.scale)

    @property
    def num_samples(self) -> int:
        """The number of samples n, those of all ranks."""
        return self._num_samples if self.ranks.several else self.own_samples

    @property
    def own_samples(self) -> int:
        """The number of samples on this rank."""
        with self.evaluation():
            return self.batches.num_samples

    @property
    def one_chunk(self) -> bool:
        """Whether all samples are evaluated at once, so that passes over them may be kept."""
        with self.evaluation():
            return self.batches.num_chunks == 1

    def evaluation(self) -> AbstractContextManager[None]:
        """Return the context in which the model is a fixed function and nothing leaves a trace."""
        return self._undisturbed(self.batches.source)

    def _undisturbed(self, source: Any) -> AbstractContextManager[None]:
        return undisturbed(
            self._objective,
            self.device,
            generators_of(source),
            note=self._notes.add,
            autocast=self.precision.autocast,
            batch_statistics=self._choices.batch_statistics,
        )

    @property
    def method(self) -> str:
        """How products with the Hessian are taken, and what they made the model do without.

        >>> model, data = nn.Linear(2, 1), (torch.ones(4, 2), torch.zeros(4, 1))
        >>> Problem(torch.compile(model), nn.MSELoss(), data, dtype=torch.float64).method
        'double backward, in float64, uncompiled'
        """
        twice = self.obstacle is None and not self.sharded
        way = "double backward" if twice else "central differences"
        statistics = "batch statistics" if self._choices.batch_statistics else None
        noted = [note for note in NOTES if note in self._notes]
        return ", ".join(filter(None, [way, self.precision.note, statistics, *noted]))

    def check_samples(self, what: str) -> None:
        """Raise ``ValueError`` where samples have no curvature of their own, which ``what`` is of."""
        if self._choices.batch_statistics:
            raise ValueError(
                f"{what} is of the samples' own Hessians, and with batch_statistics=True there are"
                " none: batch norm makes each sample's loss depend on the others in its batch. Measure"
                " it with running statistics, batch_statistics=False"
            )

    def check_twice(self) -> None:
        """Raise ``SecondDerivativeError`` where the model cannot be differentiated twice."""
        if self.obstacle is not None:
            raise self.obstacle.with_traceback(None)

    def theta(self) -> Theta:
        """Return a copy of the parameters as they are now: leaves that ask for gradients."""
        # Tensors made in an ambient inference mode could never be differentiated.
        with torch.inference_mode(False):
            return tuple(p.detach().to(self.dtype, copy=True).requires_grad_() for p in self.params)

    def chunks(self, chunk_size: int | None = None) -> Iterator[tuple[Any, int]]:
        """Yield ``(batch, size)`` on the model's device, at most ``chunk_size`` samples each,
        and never more than the problem's own chunks hold.

        Tensors are copies, since a model may work on its inputs in place.
        """
        batches, own = self.batches, self.batches.chunk_size
        if chunk_size is not None and (own is None or chunk_size < own):
            batches = batches.with_chunk_size(chunk_size)
        for batch, size in batches:
            yield map_tensors(self._fresh, batch), size

    def _fresh(self, tensor: Tensor) -> Tensor:
        return self.precision.cast(tensor.detach().to(self.device, copy=True))

    def loss(self, theta: Theta, batch: Any) -> Tensor:
        """Return the mean loss of ``batch`` at ``theta``, times ``sign``: a differentiable scalar.

        To be called inside :meth:`evaluation`.
        """
        state = self._state(self._objective, theta, "model.")
        with self.precision.around():
            loss = functional_call(self._objective, state, (batch,))
        return self.sign * checked_scalar(loss).to(self.dtype)

    def outputs(self, theta: Theta, batch: Any) -> Any:
        """Return the model's outputs for the inputs of an ``(x, y)`` batch at ``theta``."""
        with self.precision.around():
            return functional_call(self.model, self._state(self.model, theta, ""), (batch[0],))

    def _state(self, module: nn.Module, theta: Theta, prefix: str) -> dict[str, Tensor]:
        # Buffers as copies: some modules write to them even in eval mode.
        cast = self.precision.cast
        state = {name: cast(b.clone()) for name, b in module.named_buffers()}
        if self.precision.casts or self._moved:
            moved = {prefix + name for name in self._moved}
            for name, p in module.named_parameters():
                if self.precision.casts or name in moved:
                    state[name] = cast(p.detach().clone() if name in moved else p.detach())
        state.update((prefix + name, t) for name, t in zip(self.names, theta, strict=True))
        return state

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return D times the concatenation ``(d,)`` of gradients; ``None`` counts as zero."""
        # An embedding may give sparse gradients, which have no flat view.
        dense = [t.to_dense() if t is not None and t.is_sparse else t for t in tensors]
        parts = [
            torch.zeros(shape.numel(), dtype=self.dtype, device=self.device)
            if t is None
            else _scaled(t, factor).reshape(-1)
            for t, shape, factor in zip(dense, self.shapes, self.scale, strict=True)
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return D times ``vector`` ``(d,)`` as a tensor for each parameter: a tangent."""
        parts = torch.split(vector, [shape.numel() for shape in self.shapes])
        return [
            _scaled(part.view(shape), factor)
            for part, shape, factor in zip(parts, self.shapes, self.scale, strict=True)
        ]

    def value(self, theta: Theta | None = None, chunk_size: int | None = None) -> float:
        """Return the mean loss over all samples, times ``sign``, at the present parameters.

        ``chunk_size`` is the most samples at once, as for :meth:`chunks`.
        """
        theta = tuple(p.detach().to(self.dtype) for p in self.params) if theta is None else theta
        # With gradients on: without them some modules take another path, and some models, which
        # differentiate in their forward pass, none.
        with torch.inference_mode(False):
            total = torch.zeros((), dtype=torch.float64)

        def add() -> int:
            count = 0
            with self.evaluation():
                for batch, size in self.chunks(chunk_size):
                    total.add_(size * self.loss(theta, batch).detach().double().cpu())
                    count += size
            return count

        return float(self.ranks.all_reduce_mean([total], add)[0])

    def current(self) -> Problem:
        """Return the problem with the model's trainable parameters as they are by now.

        Itself, if they are the same: layers may have thawed or been replaced. Coordinates of
        :meth:`transformed` are not kept.

        Raises:
            ValueError: if parameters that were chosen by ``params`` are no longer the model's.
        """
        names, params = select_parameters(self.model, None if self._all_trainable else self.params)
        if [id(p) for p in params] == [id(p) for p in self.params]:
            return self
        other = copy.copy(self)
        other._take(names, params)
        return other

    def _take(self, names: list[str], params: list[nn.Parameter]) -> None:
        self.names, self.params = names, params
        self.precision = Precision.of(names, params, self._choices.dtype)
        self.device, self.dtype = self.precision.device, self.precision.dtype
        self.shapes = [p.shape for p in params]
        self.num_params = sum(p.numel() for p in params)
        self.memo: dict[str, Any] = {}
        self.sign = 1.0
        self.scale: tuple[Tensor | float, ...] = (1.0,) * len(params)
        self.weight_decay = (0.0,) * len(params)

    def gradient(self) -> Tensor:
        """Return the mean gradient ``(d,)`` over all samples, in the problem's coordinates."""
        theta = self.theta()
        with torch.inference_mode(False):
            total = torch.zeros(self.num_params, dtype=self.dtype, device=self.device)

        def add() -> int:
            count = 0
            with self.evaluation():
                for batch, size in self.chunks():
                    slopes = torch.autograd.grad(self.loss(theta, batch), theta, allow_unused=True)
                    total.add_(self.flatten(slopes), alpha=size)
                    count += size
            return count

        return self.ranks.all_reduce_mean([total], add)[0]

    def _share_obstacle(self) -> None:
        """Go by central differences on all ranks where one rank has to."""
        found = self.ranks.all_gather_object(self.obstacle is not None)
        if any(found) and self.obstacle is None:
            told = RuntimeError(f"rank {found.index(True)} found it so")
            self.obstacle = SecondDerivativeError(None, told)

    def _check_together(self) -> None:
        if self.ranks.several:
            check_replicas(self.ranks, self.params)

    def _note_what_moves(self) -> None:
        """Note which of the parameters that do not count a pass moves, and put them back.

        A teacher or a key encoder may follow the model in its forward pass: passes get copies of
        these. Version counters do not tell, since such updates go by ``data``.
        """
        chosen = set(self.names)
        others = {n: p for n, p in self.model.named_parameters() if n not in chosen}
        if not others:
            return
        before = {n: p.detach().clone() for n, p in others.items()}
        try:
            with self.evaluation():
                self.loss(self.theta(), cut(next(self.chunks())[0], 0, CHECKED_SAMPLES))
        finally:
            moved = {n for n, p in others.items() if not torch.equal(p.detach(), before[n])}
            for name in moved:
                others[name].data.copy_(before[name])
            self._moved = frozenset(moved)

    def _check(self) -> None:
        self._note_what_moves()
        theta = self.theta()

        def loss_at(at: Sequence[Tensor], batch: Any) -> Tensor:
            # Each time anew, so that what a model keeps from pass to pass does not tell.
            with self.evaluation():
                return self.loss(tuple(at), batch)

        def value(batch: Any) -> float:
            return float(loss_at(theta, batch).detach())

        with self.evaluation():
            batch, size = next(self.chunks())
            size = min(size, CHECKED_SAMPLES)
            batch = cut(batch, 0, size)
            with AttentionSeen(self._notes.add):
                once = value(batch)
            check_mean(once, value(map_tensors(twice_over, batch)))
            if self._choices.batch_statistics:
                # There is nothing like one sample, and a batch stays as it was cut.
                self.equal_weights = False
            else:
                singles = (value(cut(batch, index, index + 1)) for index in range(size))
                self.equal_weights = checked_weights(once, sum(singles) / size)

            def checked_loss(at: Sequence[Tensor]) -> Tensor:
                return loss_at(at, batch)

            if not check_gradient(checked_loss, theta):
                raise ValueError(
                    "loss_fn: the loss does not depend on any of the parameters that count"
                )
            try:
                differentiate_twice(checked_loss, theta)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                culprit = module_without_second_derivative(
                    self.model, lambda: self.loss(theta, batch)
                )
                self.obstacle = SecondDerivativeError(culprit, error)
                check_symmetry(checked_loss, theta)
