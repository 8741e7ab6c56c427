r"""`ShardedProblem`: the mean loss of a model under ``fully_shard`` (FSDP2).

FSDP gathers a layer's parameters, runs it, and drops them again, forward and backward. It returns
gradients, sharded as the parameters are, which cannot be differentiated again. So this module only
evaluates the model's loss and its gradient at a point, through FSDP's own passes.

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
from stableopt.curvature.problem.draws import draws
from stableopt.curvature.problem.loss_checks import (
    CHECKED_SAMPLES,
    UNEQUAL_HALF,
    UNEQUAL_SINGLE,
    check_mean,
    checked_scalar,
    twice_over,
    unequal_samples,
)
from stableopt.curvature.problem.mean_loss import MeanLoss, Theta
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.problem.weights.survey import Survey, displaced_at_random, parts_of
from stableopt.curvature.problem.weights.totals import (
    WeightTotals,
    may_differ,
    totals_seen,
    weights_of,
    weights_seen,
)
from stableopt.curvature.problem.weights.weights import GivenWeights, WeightedMean
from stableopt.distributed.collectives import LostRankError, Ranks
from stableopt.distributed.fsdp import in_half, local, mesh_of, reshard

__all__ = ["STEP", "ShardedProblem", "cube_root", "problem_for"]

STEP = 1 / 16
"""Length over which curvature changes, relative to the norm of all parameters. With 1, the sharpness
of 52 of a network was 2 % off in float32; with 1/16 its error, and that of a sharpness of 2, were below
1e-4."""

_SCALED = 0.2
"""Relative difference between the gradients and the slope of the loss that exceeds truncation."""


class ShardedProblem(MeanLoss):
    """The mean loss of a model under ``fully_shard``, each rank holding a shard of the data as well.

    Flat vectors, and ``num_params``, cover the parameters that *this rank* holds. Call every method on
    every rank. The model runs as FSDP runs it, with its own communication, so a method takes as long as
    the largest shard.

    Args:
        model: a module under ``fully_shard``, on a mesh of one dimension, whose group measures.
        loss_fn: ``loss_fn(model(x), y)``, the mean over the samples of a batch.
        data: this rank's shard, in any form that :class:`Problem` takes.
        params: the parameters that count; all trainable ones by default.
        chunk_size: the most samples evaluated at once.
        max_samples: the most samples of this rank that count.
        dtype: unsupported, as ``batch_statistics`` is: the model runs as it is.
        sample_weight: as for :class:`Problem`: this rank's weights, or a function of a batch.
        process_group: that of the mesh, or ``None``.

    Attributes:
        total_params: the number d of parameters of all ranks.

    Raises:
        ValueError, TypeError: as :class:`Problem` does; for a model that is sharded differently; for
            parameters with hooks behind their gradients, which a measurement would trigger.
        LostRankError: if a pass fails: FSDP's state, and the ranks, are then out of step.
    """

    sharded = True

    def _checked_placement(self, ranks: Ranks) -> Ranks:
        mesh = mesh_of(self.model)
        if mesh is None:
            raise TypeError("model is not under fully_shard: expected a Problem")
        own = Ranks(mesh.get_group())
        if ranks.group not in (None, own.group):
            raise ValueError(
                "process_group: a model under fully_shard is measured by the group of its mesh; leave"
                " it out"
            )
        if self._dtype is not None or self._batch_statistics:
            raise ValueError(
                f"dtype={self._dtype}, batch_statistics={self._batch_statistics}: a model under"
                " fully_shard is run as it is, by FSDP's own passes; leave them out"
            )
        return own

    def _take(self, names: list[str], params: list[nn.Parameter]) -> None:
        super()._take(names, params)
        if self.of_loss or any(p.is_complex() for p in params):
            raise ValueError(
                "params: a model under fully_shard is measured by real parameters of its own; leave"
                f" complex ones out, and those of the loss ({self.of_loss})"
            )
        self.total_params = sum(p.numel() for p in params)
        for name, p in zip(names, params, strict=True):
            if getattr(p, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"parameter {name!r} has hooks behind its gradient, as of an optimizer that steps"
                    " in the backward pass: a measurement, which is one, would set them off"
                )

    def check_samples(self, what: str) -> None:
        """Raise ``ValueError``: gradients of single samples are unavailable."""
        raise ValueError(
            f"{what} needs the gradients of single samples, and fully_shard sums them over samples and"
            " ranks; measure a replica for it"
        )

    def evaluation(self) -> AbstractContextManager[Callable[[], None]]:
        """Return the context in which the model is a fixed function and evaluation leaves no trace."""
        # Whole parameters that an earlier pass left would be gone when the state is restored.
        reshard(self.model)
        return super().evaluation()

    def _check(self) -> None:
        """Read the data only: the model runs on all ranks at once."""
        with self.evaluation():
            next(self.chunks())
            if isinstance(self._weights, GivenWeights):
                chunks = (chunk for chunk, _ in self.chunks())
                self._totals = WeightTotals.of_given(self._weights, chunks)

    def _check_together(self) -> None:
        """Check that the loss is a mean, and compare the gradients with the slope of the loss."""
        with self.evaluation():
            self._rounds = max(self.ranks.all_gather_object(self.batches.num_chunks))
            batch, held = next(self.chunks())
            batch = cut(batch, 0, min(held, CHECKED_SAMPLES))
        losses = []
        for tried in (batch, twice_over(batch)):
            with self.evaluation(), self._without_gradients():
                losses.append(self._pass(tried, 0.0))
        self.ranks.raise_together(lambda: check_mean(*losses))
        survey, random = self._find_weights(batch)
        if not random:  # with random numbers a sample differs between passes
            self._check_parts(survey.batch, survey.size)
        theta = self.theta()
        _, gradient = self._passes()
        norm, size = self.norm(gradient), self.norm(torch.cat([t.reshape(-1) for t in theta]))
        if not 0 < norm < float("inf"):
            return
        h, along = STEP * cube_root(self.dtype) * (size or 1.0), self.unflatten(gradient / norm)

        def value_at(step: float) -> float:
            return self.at(theta, along, step)[0]

        coarse, fine = (central_difference(value_at, step) for step in (h, h / 4))
        # Near a minimum the two steps disagree, and are evidence of nothing.
        agree = abs(coarse - fine) < _SCALED * abs(fine) / 4
        if agree and abs(fine - norm) > _SCALED * norm:
            raise ValueError(
                f"model: FSDP's gradients are {norm / fine:.3g} times the slope of the mean loss:"
                " expected the mean over ranks, without set_gradient_divide_factor"
            )

    def _find_weights(self, batch: Any) -> tuple[Survey, bool]:
        """Find the weights of all ranks' samples.

        Returns:
            what was seen of this rank's, and whether the loss draws random numbers on any rank.
        """
        seen: list[WeightedMean] = []

        def see() -> None:
            seen[:] = weights_seen(partial(self._pass, batch, 0.0))

        with self.evaluation(), self._without_gradients():
            random = draws(see, self._objective.generators)
        with self.evaluation():
            survey = Survey.of(self.chunks(), sought={m.ignore_index for m in seen})
        if not isinstance(self._weights, GivenWeights):
            with self.evaluation(), self._without_gradients():
                seen = weights_seen(partial(self._pass, survey.batch, 0.0))
            if self.ranks.any(may_differ(seen, survey)):
                self._totals = WeightTotals.of_chunks(survey.num_samples, self._counted())
            else:
                self._totals = WeightTotals.of_equal(survey.num_samples, seen, survey.size)
        self._weights = weights_of(self.ranks.all_gather_object(self._totals), self._weights)
        return survey, self.ranks.any(random)

    def _counted(self) -> Iterator[list[float]]:
        """Yield the sums of the weights in each of this rank's chunks, while all ranks run."""
        with self.evaluation(), self._without_gradients():
            for batch, size in self._in_rounds(self.chunks(), self._rounds):
                sums = totals_seen(partial(self._pass, batch, 0.0))
                if size:
                    yield sums

    def _check_parts(self, batch: Any, size: int) -> None:
        """Compare the gradient of ``size`` samples with the mean over parts, near the parameters."""
        share = 1 / (size * self.ranks.size)
        parts = [(cut(batch, *ends), (ends[1] - ends[0]) * share) for ends in parts_of(size)]
        rounds = max(self.ranks.all_gather_object(len(parts)))
        elsewhere = [t.detach() for t in displaced_at_random(self.theta())]
        alone = partial(self._passes, [(batch, size * share)], 1)
        _, whole = self.at(elsewhere, None, 0.0, alone)
        _, rest = self.at(elsewhere, None, 0.0, partial(self._passes, parts, rounds))
        total, apart = self.norm(rest), self.norm(whole - rest)
        difference = apart / total if 0 < total < math.inf and apart < math.inf else 0.0
        if difference > (UNEQUAL_HALF if in_half(self.model) else UNEQUAL_SINGLE):
            given = isinstance(self._weights, GivenWeights)
            raise ValueError(
                unequal_samples(difference, self.ranks.size, given=given, sharded=True)
            )

    def current(self) -> ShardedProblem:
        """Return the problem with the trainable parameters as they are by now."""
        reshard(self.model)
        return super().current()

    def theta(self) -> Theta:
        """Return copies of the parts of the parameters that this rank holds."""
        with torch.inference_mode(False), torch.no_grad():
            return tuple(local(p.detach()).clone() for p in self.params)

    def value(self, theta: Theta | None = None, chunk_size: int | None = None) -> float:
        """Return the mean loss over all samples of all ranks, times ``sign``, chunk by chunk."""
        at = self.theta() if theta is None else theta
        return self.at(at, None, 0.0, lambda: self._passes(backward=False))[0]

    def loss_and_gradient(self, theta: Theta | None = None) -> tuple[float, Tensor]:
        """Return :meth:`value` and this rank's part of the gradient, from one pass over the data."""
        return self.at(self.theta() if theta is None else theta, None, 0.0)

    def at(
        self,
        theta: Sequence[Tensor],
        along: Sequence[Tensor] | None,
        step: float,
        passes: Callable[[], tuple[float, Tensor]] | None = None,
    ) -> tuple[float, Tensor]:
        """Return loss and gradient at ``theta + step * along``; the parameters are restored exactly.

        ``passes`` returns those at the present parameters; by default over all samples.
        """
        present = self.theta()
        parts = [local(p.detach()) for p in self.params]
        try:
            with torch.no_grad():
                for index, part in enumerate(parts):
                    part.copy_(theta[index])
                    if along is not None:
                        part.add_(along[index], alpha=step)
            return (passes or self._passes)()
        finally:
            with torch.no_grad():
                for part, before in zip(parts, present, strict=True):
                    part.copy_(before)

    def _passes(
        self,
        parts: Iterable[tuple[Any, float]] | None = None,
        rounds: int | None = None,
        *,
        backward: bool = True,
    ) -> tuple[float, Tensor]:
        """Return loss and gradient at the present parameters, by FSDP's own passes.

        Args:
            parts: this rank's batches, with the weights of their mean losses; all samples by default.
            rounds: the largest number of them on a rank.
            backward: whether to compute the gradient, which is zero otherwise.
        """
        total = 0.0
        with self.evaluation(), self._without_gradients():
            if parts is None:
                parts = ((batch, size / self.num_samples) for batch, size in self.chunks())
            for batch, weight in self._in_rounds(parts, rounds or self._rounds):
                loss = self._pass(batch, weight, backward=backward)
                total += weight * loss if weight else 0.0
            gradients = [None if p.grad is None else local(p.grad) for p in self.params]
            return self.ranks.all_reduce_sum(total), self.flatten(gradients)

    @staticmethod
    def _in_rounds(parts: Iterable[tuple[Any, float]], rounds: int) -> Iterator[tuple[Any, float]]:
        """Yield ``rounds`` parts: all ranks take part in each pass.

        A rank without further ones repeats its first, with weight zero.
        """
        waiting = iter(parts)
        first = None
        for _ in range(rounds):
            batch, weight = next(waiting, (first, 0))
            first = batch if first is None else first
            yield batch, weight

    def _pass(self, batch: Any, weight: float, *, backward: bool = True) -> float:
        """Return the mean loss of ``batch`` on this rank, and add ``weight`` times its gradient."""

        def evaluate(own: Any) -> Tensor:
            with self._in_step(), torch.set_grad_enabled(backward):
                loss = self._objective(own)
            return checked_scalar(loss)

        loss = self.sign * self._weights.mean(evaluate, batch)
        if not backward:
            return float(loss)
        with self._in_step():
            # FSDP returns the mean over the ranks, each with the same weight.
            torch.autograd.backward(loss * (weight * self.ranks.size))
        return float(loss.detach())

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise LostRankError(
                f"a pass through the sharded model failed on rank {self.ranks.rank}, and the ranks are"
                f" out of step: {type(error).__name__}: {error}"
            ) from error

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Set aside what training has left: gradients, buffers, gathered parameters."""
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
        """Return the norm of a vector whose parts the ranks hold."""
        return math.sqrt(self.ranks.all_reduce_sum(float(vector.double().square().sum())))


def cube_root(dtype: torch.dtype) -> float:
    """Return the cube root of the rounding error, which relative steps of differences scale with."""
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
