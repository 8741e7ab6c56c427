"""`MeanLoss`: a model, a loss and data as one function of a flat parameter vector."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from stableopt._support.arguments import shown
from stableopt.curvature.errors import SecondDerivativeError
from stableopt.curvature.isolation.isolated import isolated
from stableopt.curvature.isolation.plain_kernels import NOTES, UNCOMPILED, compiled
from stableopt.curvature.isolation.precision import Precision
from stableopt.curvature.problem.coordinates import Coordinates
from stableopt.curvature.problem.data.batches import map_tensors
from stableopt.curvature.problem.data.layout import BatchDim, Layout
from stableopt.curvature.problem.data.probe import fixed_probe
from stableopt.curvature.problem.held import BatchLoss, Objective, in_given_layout, pair_loss
from stableopt.curvature.problem.parameters import (
    check_batch_norm,
    check_embeddings,
    real_view,
    select_parameters,
    unwrapped,
)
from stableopt.curvature.problem.weights.weights import EqualWeights, GivenWeights, SampleWeights
from stableopt.distributed.collectives import Ranks
from stableopt.distributed.fsdp import local

__all__ = ["MeanLoss", "Theta"]

Theta = tuple[Tensor, ...]
"""Values of the parameters: one tensor for each, in the problem's order."""

P = TypeVar("P", bound="MeanLoss")


class MeanLoss(abc.ABC):
    """The interface of a mean loss over data, and the code that its implementations share.

    :class:`~stableopt.curvature.Problem` implements it for ordinary models,
    :class:`~stableopt.curvature.ShardedProblem` for models under ``fully_shard``. Monitors, optimizers
    and steering use this interface only. :class:`~stableopt.curvature.Problem` explains the arguments.
    """

    sharded: ClassVar[bool]
    """Whether each rank holds a shard of every vector."""

    all_trainable: bool
    """Whether the parameters are all trainable ones of the model, and not chosen by ``params``."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Iterable[Tensor] | None = None,
        chunk_size: int | None = None,
        max_samples: int | None = None,
        dtype: torch.dtype | None = None,
        batch_statistics: bool = False,
        sample_weight: Tensor | Callable[[Any], Tensor] | None = None,
        batch_dim: BatchDim | None = None,
        second_derivatives: bool = True,
        process_group: Any = None,
    ) -> None:
        if isinstance(loss_fn, BatchLoss):
            self.loss_fn: Callable[[Any, Any], Tensor] | None = None
            batch_loss: Callable[[nn.Module, Any], Tensor] = loss_fn
        elif not callable(loss_fn) or isinstance(loss_fn, type):
            raise TypeError(f"loss_fn={shown(loss_fn)}: expected a function of outputs and targets")
        else:
            self.loss_fn = loss_fn
            batch_loss = pair_loss(loss_fn)

        ranks = Ranks(process_group)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={shown(model)}: expected a torch.nn.Module")
        self.model = unwrapped(model)
        self.layout = Layout.of(batch_dim, paired=self.loss_fn is not None)
        self._dtype, self._batch_statistics = dtype, batch_statistics
        self._second_derivatives = second_derivatives
        self._weights: SampleWeights = EqualWeights()
        if sample_weight is not None:
            if batch_statistics:
                raise ValueError(
                    "sample_weight= with batch_statistics=True: with batch statistics f is the mean of"
                    " the batches' losses, and samples have no weights; leave one of them out"
                )
            if callable(sample_weight):
                sample_weight = in_given_layout(sample_weight, self.layout)
            self._weights = GivenWeights(sample_weight, paired=self.loss_fn is not None)
        self.ranks = self._checked_placement(ranks)
        self._objective = Objective(self.model, batch_loss, self.loss_fn, self.layout)
        self._replaced_operations = {UNCOMPILED} if compiled(model) else set()
        if not batch_statistics:
            for module in (self.model, *self._objective.held_modules):
                check_batch_norm(module)
        self.all_trainable = params is None
        self._set_parameters(*select_parameters(self.model, params, self._objective))
        check_embeddings(self.model, self.params)
        # An error in one rank's data is raised on all ranks.
        self.ranks.raise_together(lambda: self._read_data(data, chunk_size, max_samples))
        if self.ranks.several:
            self._num_samples = sum(self.ranks.all_gather_object(self.own_samples))
        self._check_together()

    @classmethod
    def from_batch_loss(
        cls: type[P],
        model: nn.Module,
        batch_loss: Callable[[nn.Module, Any], Tensor],
        data: Any,
        *,
        params: Iterable[Tensor] | None = None,
        chunk_size: int | None = None,
        max_samples: int | None = None,
        dtype: torch.dtype | None = None,
        batch_statistics: bool = False,
        sample_weight: Tensor | Callable[[Any], Tensor] | None = None,
        batch_dim: BatchDim | None = None,
        second_derivatives: bool = True,
        process_group: Any = None,
    ) -> P:
        """Make a problem from ``batch_loss(model, batch)``, the mean loss of a batch of any form.

        Use it for batches that are dictionaries, and for models that compute their own loss. ``data``
        is one batch, or a re-iterable of batches. The first dimension of every tensor in a batch, or
        ``batch_dim``, counts its samples. The other arguments, and the errors, are those of the class.

        >>> from stableopt.curvature import Problem
        >>> model = nn.Linear(2, 1)
        >>> batch = {"x": torch.ones(4, 2)}
        >>> loss = lambda model, batch: model(batch["x"]).square().mean()
        >>> Problem.from_batch_loss(model, loss, batch).num_samples
        4
        """
        return cls(
            model,
            BatchLoss(batch_loss),
            data,
            params=params,
            chunk_size=chunk_size,
            max_samples=max_samples,
            dtype=dtype,
            batch_statistics=batch_statistics,
            sample_weight=sample_weight,
            batch_dim=batch_dim,
            second_derivatives=second_derivatives,
            process_group=process_group,
        )

    def __repr__(self) -> str:
        kind, model = type(self).__name__, type(self.model).__name__
        counts = self.batches.known_counts
        data = "" if counts is None else f", {counts[0]:,} samples"
        return f"<{kind} of {model}: {self.num_params:,} parameters{data}>"

    def _read_data(self, data: Any, chunk_size: int | None, max_samples: int | None) -> None:
        # A loader draws a seed whenever an iterator is made, so reading needs isolation.
        with self.evaluation():
            self.batches = fixed_probe(
                data,
                chunk_size=chunk_size,
                paired=self.loss_fn is not None,
                max_samples=max_samples,
                layout=self.layout,
            )
        self._check()

    def _set_parameters(self, names: list[str], params: list[nn.Parameter]) -> None:
        """Make the problem a function of these parameters, in their own coordinates."""
        self.names, self.params = names, params
        self.precision = Precision.of_parameters(names, params, self._dtype)
        self.device, self.dtype = self.precision.device, self.precision.dtype
        self.shapes = [real_view(local(p).detach()).shape for p in params]
        self.num_params = sum(shape.numel() for shape in self.shapes)
        in_model = {id(p) for p in self.model.parameters()}
        self.names_in_loss = [
            name for name, p in zip(names, params, strict=True) if id(p) not in in_model
        ]
        self.masks: list[Tensor | None] = [None] * len(params)
        self.coordinates = Coordinates(names, self.shapes, self.dtype, self.device)
        self.memos: dict[object, dict[str, Any]] = {}

    @abc.abstractmethod
    def _checked_placement(self, ranks: Ranks) -> Ranks:
        """Return the ranks that measure; raise for parameters in an unsupported placement."""

    @abc.abstractmethod
    def _check(self) -> None:
        """Check the loss on this rank's data, without communication."""

    @abc.abstractmethod
    def _check_together(self) -> None:
        """Check the loss on all ranks together, with communication."""

    @abc.abstractmethod
    def theta(self) -> Theta:
        """Return a copy of this rank's part of the parameters as they are now."""

    @abc.abstractmethod
    def value(self, theta: Theta | None = None) -> float:
        """Return the mean loss over all samples, times ``sign``, at ``theta`` or the parameters."""

    @abc.abstractmethod
    def loss_and_gradient(self, theta: Theta | None = None) -> tuple[float, Tensor]:
        """Return :meth:`value` and the gradient ``(d,)``, from one pass over the data."""

    def gradient(self) -> Tensor:
        """Return the mean gradient ``(d,)`` over all samples, in the problem's coordinates."""
        return self.loss_and_gradient()[1]

    @abc.abstractmethod
    def check_samples(self, what: str) -> None:
        """Raise ``ValueError`` if samples have no curvature of their own; ``what`` needs it."""

    def transformed(
        self: P,
        *,
        sign: float = 1.0,
        scale: Sequence[Tensor | float] | None = None,
        weight_decay: Sequence[Tensor | float] | None = None,
    ) -> P:
        r"""Return the problem in the coordinates of an optimizer with several parameter groups.

        .. math:: g(y) = \pm f(\theta_0 + D y) + \tfrac12 \|\Lambda^{1/2} D y\|^2

        The Hessian becomes :math:`D(\pm H + \Lambda)D`: with :math:`D^2 = P` a diagonal
        preconditioner (per-group learning rates), :math:`\Lambda` coupled weight decay that differs
        between groups, and a minus sign for ``maximize``.

        Args:
            sign: 1, or -1 to measure -f.
            scale: the diagonal of D: for each parameter a factor, or a tensor of its shape.
            weight_decay: the diagonal of Lambda: for each parameter a coefficient, or a tensor.

        >>> from stableopt.curvature import Problem
        >>> model = nn.Linear(2, 1)
        >>> problem = Problem(model, nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
        >>> problem.transformed(scale=[2.0, 1.0]).flatten([torch.ones(1, 2), torch.ones(1)])
        tensor([2., 2., 1.])
        """
        other = copy.copy(self)
        other.coordinates = self.coordinates.transformed(
            sign=sign, scale=scale, weight_decay=weight_decay
        ).masked(self.masks)
        return other

    def restricted(self: P, params: Iterable[Tensor]) -> P:
        """Return the problem as a function of those of its parameters that are in ``params``.

        The other parameters stay constant. Coordinates of :meth:`transformed` are dropped.

        >>> from stableopt.curvature import Problem
        >>> model = nn.Linear(2, 1)
        >>> problem = Problem(model, nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
        >>> problem.restricted([model.bias]).names
        ['bias']
        """
        chosen = {id(p) for p in params}
        kept = [(n, p) for n, p in zip(self.names, self.params, strict=True) if id(p) in chosen]
        other = copy.copy(self)
        other.all_trainable = False
        other._set_parameters([name for name, _ in kept], [p for _, p in kept])
        return other

    def untransformed(self: P) -> P:
        """Return the problem without scale and weight decay, with the same sign."""
        return self.transformed(sign=self.sign)

    def without_weight_decay(self: P) -> P:
        """Return the problem in the same coordinates without weight decay."""
        return self.transformed(sign=self.sign, scale=self.scale)

    @property
    def sign(self) -> float:
        """1, or -1 in the coordinates of -f."""
        return self.coordinates.sign

    @property
    def scale(self) -> tuple[Tensor | float, ...]:
        """The diagonal of D, for each parameter."""
        return self.coordinates.scale

    @property
    def weight_decay(self) -> tuple[Tensor | float, ...]:
        """The diagonal of Lambda, for each parameter."""
        return self.coordinates.weight_decay

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return D times the concatenation ``(d,)`` of gradients; ``None`` counts as zero."""
        return self.coordinates.flatten(tensors)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return D times ``vector`` ``(d,)`` as a tensor for each parameter: a tangent."""
        return self.coordinates.unflatten(vector)

    @property
    def num_samples(self) -> int:
        """The number of samples n on all ranks."""
        return self._num_samples if self.ranks.several else self.own_samples

    @property
    def own_samples(self) -> int:
        """The number of samples on this rank."""
        return self.counts()[0]

    def counts(self) -> tuple[int, int]:
        """Return the numbers of samples and of chunks on this rank."""
        if self.batches.known_counts is None:
            with self.evaluation():  # counting data of unknown length reads them
                return self.batches.num_samples, self.batches.num_chunks
        return self.batches.known_counts

    def chunks(self, chunk_size: int | None = None) -> Iterator[tuple[Any, int]]:
        """Yield ``(batch, size)`` on the model's device, of at most ``chunk_size`` samples each.

        Chunks are not larger than the problem's own. Tensors are copies, since a model may change its
        inputs in place.
        """
        batches, own_size = self.batches, self.batches.chunk_size
        if chunk_size is not None and (own_size is None or chunk_size < own_size):
            batches = batches.with_chunk_size(chunk_size)
        start = 0
        for batch, size in batches:
            yield self._weights.attached(map_tensors(self._copy, batch), start, size), size
            start += size

    def _copy(self, tensor: Tensor) -> Tensor:
        return self.precision.cast(tensor.detach().to(self.device, copy=True))

    def evaluation(self) -> AbstractContextManager[Callable[[], None]]:
        """Return a context in which the model is a fixed function and evaluation has no side effects."""
        return isolated(
            self._objective,
            self.device,
            note=self._replaced_operations.add,
            autocast=self.precision.autocast,
            batch_statistics=self._batch_statistics,
        )

    @property
    def obstacle(self) -> SecondDerivativeError | None:
        """Why the model cannot be differentiated twice, or ``None``."""
        return None

    def _hessian_method(self) -> tuple[str, bool]:
        """Return how Hessian-vector products are computed, and whether differences avoid kinks."""
        return ("central differences" if self.sharded else "double backward"), False

    @property
    def method(self) -> str:
        """How Hessian-vector products are computed, and which fast operations were replaced.

        >>> from stableopt.curvature import Problem
        >>> model, data = nn.Linear(2, 1), (torch.ones(4, 2), torch.zeros(4, 1))
        >>> Problem(torch.compile(model), nn.MSELoss(), data, dtype=torch.float64).method
        'double backward, in float64, uncompiled'
        """
        hessian_method, kinked = self._hessian_method()
        precision = self.precision.note
        if kinked and precision is None and self.dtype != torch.float64:
            # Differences between kinks are taken in double precision.
            precision = self.precision.in_double().note
        statistics = "batch statistics" if self._batch_statistics else None
        replaced = [note for note in NOTES if note in self._replaced_operations]
        return ", ".join(filter(None, [hessian_method, precision, statistics, *replaced]))

    def current(self: P) -> P:
        """Return the problem of the model's present trainable parameters.

        Layers may have been thawed or replaced. If none were, the problem returns itself; otherwise
        coordinates of :meth:`transformed` are dropped.

        Raises:
            ValueError: if parameters chosen by ``params`` no longer belong to the model.
        """
        chosen = None if self.all_trainable else self.params
        names, params = select_parameters(self.model, chosen, self._objective)
        if [id(p) for p in params] == [id(p) for p in self.params]:
            return self
        other = copy.copy(self)
        other._set_parameters(names, params)
        return other
