r"""`ShardedProblem`: the mean loss of a model under ``fully_shard`` (FSDP2).

In the forward and the backward pass FSDP gathers the parameters of a layer, runs the layer, and frees
them. Its gradients are sharded like the parameters, and cannot be differentiated again. So this module
only evaluates the loss and its gradient at a point, through FSDP's own passes.

FSDP sums gradients over samples, so per-sample quantities such as the non-uniformity and the critical
learning rate are unavailable. Sharpness is available through
:class:`~stableopt.curvature.products.sharded_hessian.ShardedHessian`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.autodiff import central_difference
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.data.draws import draws_random_numbers
from stableopt.curvature.problem.loss_checks import (
    CHECKED_SAMPLES,
    UNEQUAL_HALF,
    UNEQUAL_SINGLE,
    check_mean,
    checked_scalar,
    twice_over,
    unequal_samples_message,
)
from stableopt.curvature.problem.mean_loss import MeanLoss, Theta
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.problem.weights.survey import Survey, displaced_at_random, parts_of
from stableopt.curvature.problem.weights.totals import (
    WeightTotals,
    weight_sums_in,
    weighted_means_in,
    weights_may_differ,
    weights_of,
)
from stableopt.curvature.problem.weights.weights import GivenWeights, WeightedMean
from stableopt.distributed.collectives import LostRankError, Ranks
from stableopt.distributed.fsdp import in_half, local, mesh_of, reshard

__all__ = ["STEP", "ShardedProblem", "cube_root", "problem_for"]

STEP = 1 / 16
"""Length over which the curvature changes, relative to the norm of all parameters. In float32, a value
of 1 gave a sharpness of 52 with an error of 2 %; 1/16 gave it, and a sharpness of 2, to 1e-4."""

_SLOPE_TOLERANCE = 0.2
"""Relative difference of gradient and slope of the loss that truncation does not explain."""


class ShardedProblem(MeanLoss):
    """The mean loss of a model under ``fully_shard``; each rank also holds a shard of the data.

    Flat vectors, and ``num_params``, cover the parameters that *this rank* holds. Call every method on
    every rank. The model runs through FSDP, with FSDP's own communication, so a method takes as long as
    the largest data shard.

    Args:
        model: a module under ``fully_shard``, on a mesh of one dimension, whose group measures.
        loss_fn: ``loss_fn(model(x), y)``, the mean over the samples of a batch.
        data: this rank's shard, in any form that :class:`Problem` takes.
        params: the parameters to differentiate in; all trainable ones by default.
        chunk_size: the most samples evaluated at once.
        max_samples: the most samples of this rank to use.
        dtype: unsupported, like ``batch_statistics``: the model runs as it is.
        sample_weight: as for :class:`Problem`: this rank's weights, or a function of a batch.
        process_group: the group of the mesh, or ``None``.

    Attributes:
        total_params: the number d of parameters of all ranks.

    Raises:
        ValueError, TypeError: as :class:`Problem` does; for a model that is sharded differently; for
            parameters with post-accumulate hooks, which a measurement would trigger.
        LostRankError: if a pass fails, which leaves the ranks and FSDP's state out of step.
    """

    sharded = True

    def _checked_placement(self, ranks: Ranks) -> Ranks:
        mesh = mesh_of(self.model)
        if mesh is None:
            raise TypeError("model is not under fully_shard: expected a Problem")
        mesh_ranks = Ranks(mesh.get_group())
        if ranks.group not in (None, mesh_ranks.group):
            raise ValueError(
                "process_group: a model under fully_shard is measured by the group of its mesh; leave"
                " it out"
            )
        if self._dtype is not None or self._batch_statistics:
            raise ValueError(
                f"dtype={self._dtype}, batch_statistics={self._batch_statistics}: a model under"
                " fully_shard runs as it is, by FSDP's own passes; leave them out"
            )
        return mesh_ranks

    def _set_parameters(self, names: list[str], params: list[nn.Parameter]) -> None:
        super()._set_parameters(names, params)
        if self.names_in_loss or any(p.is_complex() for p in params):
            raise ValueError(
                "params: under fully_shard, only real parameters of the model can be measured; leave"
                f" out complex ones, and those of the loss ({self.names_in_loss})"
            )
        self.total_params = sum(p.numel() for p in params)
        for name, p in zip(names, params, strict=True):
            if getattr(p, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"parameter {name!r} has a post-accumulate-grad hook, as of an optimizer that steps"
                    " in the backward pass: a measurement would trigger it; remove it"
                )

    def check_samples(self, what: str) -> None:
        """Raise ``ValueError``: gradients of single samples are unavailable."""
        raise ValueError(
            f"{what} needs per-sample gradients, and fully_shard sums gradients over samples and ranks:"
            " measure a replica of the model"
        )

    def evaluation(self) -> AbstractContextManager[Callable[[], None]]:
        """Return a context in which the model is a fixed function and evaluation has no side effects."""
        # The snapshot must not contain gathered parameters of an earlier pass, which are freed later.
        reshard(self.model)
        return super().evaluation()

    def _check(self) -> None:
        """Check the data only: the model runs on all ranks at once."""
        with self.evaluation():
            next(self.chunks())
            if isinstance(self._weights, GivenWeights):
                chunks = (chunk for chunk, _ in self.chunks())
                self._totals = WeightTotals.of_given(self._weights, chunks)

    def _check_together(self) -> None:
        """Check that the loss is a mean, and compare the gradients with the slope of the loss."""
        with self.evaluation():
            self._num_rounds = max(self.ranks.all_gather_object(self.batches.num_chunks))
            batch, size = next(self.chunks())
            batch = cut(batch, 0, min(size, CHECKED_SAMPLES))
        losses = []
        for part in (batch, twice_over(batch)):
            with self.evaluation(), self._without_gradients():
                losses.append(self._pass(part, 0.0))
        self.ranks.raise_together(lambda: check_mean(*losses))
        survey, random = self._find_weights(batch)
        if not random:  # with random numbers a sample's loss differs between passes
            self._check_sample_weights(survey.batch, survey.size)
        self._check_gradient_scale()

    def _check_gradient_scale(self) -> None:
        """Compare the norm of the gradient with the slope of the loss along the gradient."""
        theta = self.theta()
        _, gradient = self._passes()
        norm, size = self.norm(gradient), self.norm(torch.cat([t.reshape(-1) for t in theta]))
        if not 0 < norm < float("inf"):
            return
        step, direction = (
            STEP * cube_root(self.dtype) * (size or 1.0),
            self.unflatten(gradient / norm),
        )

        def value_at(distance: float) -> float:
            return self.at(theta, direction, distance)[0]

        coarse, fine = central_difference(value_at, step), central_difference(value_at, step / 4)
        # Near a minimum the two differences disagree, and nothing can be concluded.
        agree = abs(coarse - fine) < _SLOPE_TOLERANCE * abs(fine) / 4
        if agree and abs(fine - norm) > _SLOPE_TOLERANCE * norm:
            raise ValueError(
                f"model: FSDP's gradients are {norm / fine:.3g} times the slope of the mean loss:"
                " expected the mean over ranks, without set_gradient_divide_factor"
            )

    def _find_weights(self, batch: Any) -> tuple[Survey, bool]:
        """Find the weights of all ranks' samples.

        Returns:
            the survey of this rank's data, and whether the loss draws random numbers on any rank.
        """
        means: list[WeightedMean] = []

        def record_means() -> None:
            means[:] = weighted_means_in(partial(self._pass, batch, 0.0))

        with self.evaluation(), self._without_gradients():
            random = draws_random_numbers(record_means, self._objective.generators)
        with self.evaluation():
            survey = Survey.of(self.chunks(), sought={m.ignore_index for m in means})
        if not isinstance(self._weights, GivenWeights):
            with self.evaluation(), self._without_gradients():
                means = weighted_means_in(partial(self._pass, survey.batch, 0.0))
            if self.ranks.any(weights_may_differ(means, survey)):
                self._totals = WeightTotals.of_chunks(survey.num_samples, self._weight_sums())
            else:
                self._totals = WeightTotals.of_equal(survey.num_samples, means, survey.size)
        self._weights = weights_of(self.ranks.all_gather_object(self._totals), self._weights)
        return survey, self.ranks.any(random)

    def _weight_sums(self) -> Iterator[list[float]]:
        """Yield the sums of the weights in each of this rank's chunks. All ranks take part."""
        with self.evaluation(), self._without_gradients():
            for batch, size in self._in_rounds(self.chunks(), self._num_rounds):
                sums = weight_sums_in(partial(self._pass, batch, 0.0))
                if size:
                    yield sums

    def _check_sample_weights(self, batch: Any, size: int) -> None:
        """Compare the gradient of ``size`` samples with the mean over parts, near the parameters."""
        weight = 1 / (size * self.ranks.size)
        parts = [
            (cut(batch, start, stop), (stop - start) * weight) for start, stop in parts_of(size)
        ]
        rounds = max(self.ranks.all_gather_object(len(parts)))
        point = [t.detach() for t in displaced_at_random(self.theta())]
        whole_pass = partial(self._passes, [(batch, size * weight)], 1)
        _, of_batch = self.at(point, None, 0.0, whole_pass)
        _, of_parts = self.at(point, None, 0.0, partial(self._passes, parts, rounds))
        norm, distance = self.norm(of_parts), self.norm(of_batch - of_parts)
        finite = 0 < norm < math.inf and distance < math.inf
        difference = distance / norm if finite else 0.0
        if difference > (UNEQUAL_HALF if in_half(self.model) else UNEQUAL_SINGLE):
            given = isinstance(self._weights, GivenWeights)
            raise ValueError(
                unequal_samples_message(difference, self.ranks.size, given=given, sharded=True)
            )

    def current(self) -> ShardedProblem:
        """Return the problem of the model's present trainable parameters."""
        reshard(self.model)
        return super().current()

    def theta(self) -> Theta:
        """Return copies of the parts of the parameters that this rank holds."""
        with torch.inference_mode(False), torch.no_grad():
            return tuple(local(p.detach()).clone() for p in self.params)

    def value(self, theta: Theta | None = None) -> float:
        """Return the mean loss over all samples of all ranks, times ``sign``, chunk by chunk."""
        point = self.theta() if theta is None else theta
        return self.at(point, None, 0.0, lambda: self._passes(backward=False))[0]

    def loss_and_gradient(self, theta: Theta | None = None) -> tuple[float, Tensor]:
        """Return :meth:`value` and this rank's part of the gradient, from one pass over the data."""
        point = self.theta() if theta is None else theta
        return self.at(point, None, 0.0)

    def at(
        self,
        theta: Sequence[Tensor],
        along: Sequence[Tensor] | None,
        step: float,
        passes: Callable[[], tuple[float, Tensor]] | None = None,
    ) -> tuple[float, Tensor]:
        """Return loss and gradient at ``theta + step * along``; the parameters are restored exactly.

        ``passes`` returns loss and gradient at the present parameters; by default over all samples.
        """
        before = self.theta()
        shards = [local(p.detach()) for p in self.params]
        try:
            with torch.no_grad():
                for index, shard in enumerate(shards):
                    shard.copy_(theta[index])
                    if along is not None:
                        shard.add_(along[index], alpha=step)
            return (passes or self._passes)()
        finally:
            with torch.no_grad():
                for shard, value in zip(shards, before, strict=True):
                    shard.copy_(value)

    def _passes(
        self,
        parts: Iterable[tuple[Any, float]] | None = None,
        rounds: int | None = None,
        *,
        backward: bool = True,
    ) -> tuple[float, Tensor]:
        """Return loss and gradient at the present parameters, by FSDP's own passes.

        Args:
            parts: this rank's batches with the weights of their mean losses; all samples by default.
            rounds: the largest number of parts on a rank.
            backward: whether to compute the gradient; otherwise it is zero.
        """
        total = 0.0
        with self.evaluation(), self._without_gradients():
            if parts is None:
                parts = ((batch, size / self.num_samples) for batch, size in self.chunks())
            for batch, weight in self._in_rounds(parts, rounds or self._num_rounds):
                loss = self._pass(batch, weight, backward=backward)
                total += weight * loss if weight else 0.0
            gradients = [None if p.grad is None else local(p.grad) for p in self.params]
            return self.ranks.all_reduce_sum(total), self.flatten(gradients)

    @staticmethod
    def _in_rounds(parts: Iterable[tuple[Any, float]], rounds: int) -> Iterator[tuple[Any, float]]:
        """Yield ``rounds`` parts, since all ranks take part in each pass.

        A rank without further parts repeats its first batch with weight zero.
        """
        remaining = iter(parts)
        first = None
        for _ in range(rounds):
            batch, weight = next(remaining, (first, 0))
            first = batch if first is None else first
            yield batch, weight

    def _pass(self, batch: Any, weight: float, *, backward: bool = True) -> float:
        """Return the mean loss of ``batch`` on this rank, and add ``weight`` times its gradient."""

        def evaluate(part: Any) -> Tensor:
            with self._lost_rank_on_error(), torch.set_grad_enabled(backward):
                loss = self._objective(part)
            return checked_scalar(loss)

        loss = self.sign * self._weights.mean(evaluate, batch)
        if not backward:
            return float(loss)
        with self._lost_rank_on_error():
            # FSDP averages over the ranks with equal weights.
            torch.autograd.backward(loss * (weight * self.ranks.size))
        return float(loss.detach())

    @contextmanager
    def _lost_rank_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise LostRankError(
                f"a pass through the sharded model failed on rank {self.ranks.rank}, and the ranks are"
                f" out of step: {type(error).__name__}: {error}"
            ) from error

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Set aside the gradients and buffers of training, and free gathered parameters."""
        reshard(self.model)
        gradients = [(p, p.grad) for p in self._objective.parameters()]
        buffers = [(buffer, buffer.clone()) for buffer in self._objective.buffers()]
        try:
            for p, _ in gradients:
                p.grad = None
            yield
        finally:
            reshard(self.model)
            for p, gradient in gradients:
                p.grad = gradient
            for buffer, before in buffers:
                buffer.copy_(before)

    def norm(self, vector: Tensor) -> float:
        """Return the norm of a vector that is sharded over the ranks."""
        return math.sqrt(self.ranks.all_reduce_sum(float(vector.double().square().sum())))


def cube_root(dtype: torch.dtype) -> float:
    """Return the cube root of the rounding error, the scale of relative steps of differences."""
    return float(torch.finfo(dtype).eps ** (1 / 3))


def problem_for(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], data: Any, **options: Any
) -> Problem | ShardedProblem:
    """Return the :class:`Problem` of a model, or the :class:`ShardedProblem` of a sharded one."""
    sharded = isinstance(model, nn.Module) and mesh_of(model) is not None
    return (ShardedProblem if sharded else Problem)(model, loss_fn, data, **options)


def require_samples(problem: MeanLoss, what: str) -> Problem:
    """Return ``problem`` if its samples have curvature of their own, which ``what`` needs.

    Raises:
        ValueError: for batch statistics, and for a model under ``fully_shard``.
    """
    problem.check_samples(what)
    assert isinstance(problem, Problem)
    return problem
