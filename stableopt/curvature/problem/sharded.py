r"""A problem whose model is under ``fully_shard`` (FSDP2): parameters, vectors and data in pieces.

FSDP gathers a layer's parameters, runs it, and drops them again, forward and backward; what it returns
are gradients, sharded as the parameters are, and they cannot be differentiated again. So all that is
asked of the model here is its loss and its gradient at a point, through FSDP's own passes.

FSDP sums gradients over the samples, so those of single samples, and with them the non-uniformity and
the critical learning rate, are not to be had. The sharpness is:
:class:`~stableopt.curvature.products.sharded_hessian.ShardedHessian`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.problem.data import cut, map_tensors
from stableopt.curvature.problem.fsdp import local, mesh_of, reshard
from stableopt.curvature.problem.loss_checks import (
    CHECKED_SAMPLES,
    check_mean,
    checked_scalar,
    twice_over,
)
from stableopt.curvature.problem.problem import Choices, Problem, Theta
from stableopt.distributed import LostRankError, Ranks

__all__ = ["STEP", "ShardedProblem", "cube_root", "sharded_or_whole"]

STEP = 1 / 16
"""Where a curvature changes, relative to the norm of all parameters. With 1 a network of sharpness 52
was 2 % off in float32, with 1/16 its error and that of one of sharpness 2 were below 1e-4."""

_SCALED = 0.2
"""Relative difference between the gradients and the slope of the loss that is more than truncation."""


class ShardedProblem(Problem):
    """The mean loss of a model under ``fully_shard``, each rank holding a shard of the data as well.

    Flat vectors, and ``num_params``, are of the parameters that *this rank* holds; every method is to
    be called on every rank. The model is run as FSDP runs it, with its own communication, so each of
    them takes as long as the largest shard.

    Args:
        model: a module under ``fully_shard``, on a mesh of one dimension, whose group measures.
        loss_fn: ``loss_fn(model(x), y)``, the mean over the samples of a batch.
        data: this rank's shard, in any form that :class:`Problem` takes.
        params: the parameters that count; all trainable ones by default.
        chunk_size: the most samples evaluated at once.
        process_group: no other than that of the mesh.

    Attributes:
        total_params: the number d of parameters of all ranks.

    Raises:
        ValueError, TypeError: as :class:`Problem` does, and for a model that is not sharded so; for
            parameters with hooks behind their gradients, which a measurement would set off.
        LostRankError: where a pass fails: FSDP's state, and the ranks, are then no longer in step.
    """

    sharded = True

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
        mesh = mesh_of(model)
        if mesh is None:
            raise TypeError("model is not under fully_shard: expected a Problem")
        own = Ranks(mesh.get_group())
        if ranks.group not in (None, own.group):
            raise ValueError(
                "process_group: a model under fully_shard is measured by the group of its mesh; leave"
                " it out"
            )
        if choices != Choices(None, batch_statistics=False):
            raise ValueError(
                f"dtype={choices.dtype}, batch_statistics={choices.batch_statistics}: a model under"
                " fully_shard is run as it is, by FSDP's own passes; leave them out"
            )
        super()._set_up(model, batch_loss, data, params, chunk_size, choices, own, paired=paired)

    def _take(self, names: list[str], params: list[nn.Parameter]) -> None:
        super()._take(names, params)
        self.shapes = [local(p).shape for p in params]
        self.num_params = sum(shape.numel() for shape in self.shapes)
        self.total_params = sum(p.numel() for p in params)
        for name, p in zip(names, params, strict=True):
            if getattr(p, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"parameter {name!r} has hooks behind its gradient, as of an optimizer that steps"
                    " in the backward pass: a measurement, which is one, would set them off"
                )

    def check_samples(self, what: str) -> None:
        """Raise ``ValueError``: the gradients of single samples are not to be had."""
        raise ValueError(
            f"{what} needs the gradients of single samples, and fully_shard sums them over samples and"
            " ranks; measure a replica for it"
        )

    def _undisturbed(self, source: Any) -> AbstractContextManager[None]:
        # Whole parameters that a pass has left are no longer there when all is put back.
        reshard(self.model)
        return super()._undisturbed(source)

    def _check(self) -> None:
        """Only read the data: the model cannot be run before all ranks are there."""
        with self.evaluation():
            next(self.chunks())

    def _check_together(self) -> None:
        """Try whether the loss is a mean, and compare the gradients with the slope of the loss."""
        with self.evaluation():
            self._rounds = max(self.ranks.all_gather_object(self.batches.num_chunks))
            batch, held = next(self.chunks())
            batch = cut(batch, 0, min(held, CHECKED_SAMPLES))
        losses = []
        for tried in (batch, map_tensors(twice_over, batch)):
            with self.evaluation(), self._without_gradients():
                losses.append(self._pass(tried, 0.0))
        self.ranks.raise_together(lambda: check_mean(*losses))
        theta = self.theta()
        _, gradient = self._passes()
        norm, size = self.norm(gradient), self.norm(torch.cat([t.reshape(-1) for t in theta]))
        if not 0 < norm < float("inf"):
            return
        h = STEP * cube_root(self.dtype) * (size or 1.0)
        along, slopes = self.unflatten(gradient / norm), []
        for step in (h, h / 4):
            ahead, behind = (self.at(theta, along, signed)[0] for signed in (step, -step))
            slopes.append((ahead - behind) / (2 * step))
        # Where the two steps do not agree, near a minimum, they say nothing.
        agree = abs(slopes[0] - slopes[1]) < _SCALED * abs(slopes[1]) / 4
        if agree and abs(slopes[1] - norm) > _SCALED * norm:
            raise ValueError(
                f"model: FSDP's gradients are {norm / slopes[1]:.3g} times the slope of the mean loss:"
                " expected the mean over ranks, without set_gradient_divide_factor"
            )

    def current(self) -> Problem:
        """Return the problem with the trainable parameters as they are by now."""
        reshard(self.model)
        return super().current()

    def theta(self) -> Theta:
        """Return copies of the parts of the parameters that this rank holds."""
        with torch.inference_mode(False), torch.no_grad():
            return tuple(local(p.detach()).clone() for p in self.params)

    def loss(self, theta: Theta, batch: Any) -> Tensor:
        """Raise ``TypeError``: FSDP runs the model at its own parameters alone."""
        raise TypeError(
            "a model under fully_shard cannot be run at other parameters: expected ShardedHessian,"
            " which measures by differences of gradients, in place of the other operators"
        )

    def outputs(self, theta: Theta, batch: Any) -> Any:
        """Raise ``TypeError``, as :meth:`loss` does."""
        return self.loss(theta, batch)

    def transformed(
        self,
        *,
        sign: float = 1.0,
        scale: Sequence[Tensor | float] | None = None,
        weight_decay: Sequence[float] | None = None,
    ) -> Problem:
        """Return the problem in other coordinates; of a ``scale`` this rank's part counts."""
        if scale is not None:
            scale = [local(f) if isinstance(f, Tensor) else f for f in scale]
        return super().transformed(sign=sign, scale=scale, weight_decay=weight_decay)

    def value(self, theta: Theta | None = None, chunk_size: int | None = None) -> float:
        """Return the mean loss over all samples of all ranks, times ``sign``, chunk by chunk."""
        return self.at(self.theta() if theta is None else theta, None, 0.0)[0]

    def gradient(self) -> Tensor:
        """Return this rank's part of the mean gradient, in the problem's coordinates."""
        return self.at(self.theta(), None, 0.0)[1]

    def at(self, theta: Theta, along: Sequence[Tensor] | None, step: float) -> tuple[float, Tensor]:
        """Return loss and gradient at ``theta + step * along``; the parameters stay, bit for bit."""
        present = self.theta()
        parts = [local(p.detach()) for p in self.params]
        try:
            with torch.no_grad():
                for index, part in enumerate(parts):
                    part.copy_(theta[index])
                    if along is not None:
                        part.add_(along[index], alpha=step)
            return self._passes()
        finally:
            with torch.no_grad():
                for part, before in zip(parts, present, strict=True):
                    part.copy_(before)

    def _passes(self) -> tuple[float, Tensor]:
        """Return loss and gradient at the parameters as they are, by FSDP's own passes."""
        total = 0.0
        with self.evaluation(), self._without_gradients():
            # Each pass is a meeting: a rank that has no more chunks takes one again, of weight zero.
            chunks = iter(self.chunks())
            for number in range(self._rounds):
                batch, size = next(chunks, (None, 0))
                if number == 0:
                    first = batch
                loss = self._pass(first if batch is None else batch, size / self.num_samples)
                total += size / self.num_samples * loss if size else 0.0
            gradients = [None if p.grad is None else local(p.grad) for p in self.params]
            return self.ranks.all_reduce_sum(total), self.flatten(gradients)

    def _pass(self, batch: Any, weight: float) -> float:
        """Return the mean loss of ``batch`` on this rank, and add ``weight`` times its gradient."""
        with self._in_step():
            loss = self._objective(batch)
        loss = self.sign * checked_scalar(loss)
        with self._in_step():
            # FSDP returns the mean over the ranks, whatever they hold.
            torch.autograd.backward(loss * (weight * self.ranks.size))
        return float(loss.detach())

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise LostRankError(
                f"a pass through the sharded model failed on rank {self.ranks.rank}, and the ranks are"
                f" no longer in step: {type(error).__name__}: {error}"
            ) from error

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Set aside what training has left: gradients, buffers, parameters that are whole."""
        reshard(self.model)
        gradients = [(p, p.grad) for p in self.model.parameters()]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
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
        """Return the norm of a vector of which every rank holds its part."""
        return math.sqrt(self.ranks.all_reduce_sum(float(vector.double().square().sum())))


def cube_root(dtype: torch.dtype) -> float:
    """Return that of the rounding: relative steps of central differences are as long."""
    return float(torch.finfo(dtype).eps ** (1 / 3))


def sharded_or_whole(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], data: Any, **options: Any
) -> Problem:
    """Return the :class:`Problem` of a model, or the :class:`ShardedProblem` of a sharded one."""
    sharded = isinstance(model, nn.Module) and mesh_of(model) is not None
    return (ShardedProblem if sharded else Problem)(model, loss_fn, data, **options)
