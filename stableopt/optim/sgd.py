"""`SGD` and `GD`: stochastic and full-batch gradient descent, bit for bit ``torch.optim.SGD``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.problem.data.batches import Batches, map_tensors
from stableopt.optim.chunk_weights import ChunkWeights
from stableopt.optim.trackable import Tracking

__all__ = ["GD", "SGD"]


class SGD(Tracking, torch.optim.SGD):
    """``torch.optim.SGD`` with ``track`` and ``margins``; same arguments, same numbers.

    ``step`` is torch's own: hooks, schedulers, scalers and compilation work as usual. There is one
    difference: if a gradient scaler skips the first fused step, momentum buffers stay unset, while
    torch 2.13 leaves uninitialised memory in them.

    >>> import stableopt
    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = stableopt.SGD([weight], lr=0.5)
    >>> weight.grad = torch.tensor([1.0])
    >>> optimizer.step()
    >>> weight.item()
    0.5
    """

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffer_list: list[Tensor | None],
    ) -> bool:
        sparse: bool = super()._init_group(  # type: ignore[no-untyped-call]
            group, params, grads, momentum_buffer_list
        )
        found_inf = getattr(self, "found_inf", None)
        unset = any(buffer is None for buffer in momentum_buffer_list)
        # If the scaler found an infinity, the fused kernel would leave new buffers uninitialised.
        # Until the buffers exist, the check costs one host transfer a step.
        if group["fused"] and unset and found_inf is not None and bool(found_inf):
            for tensors in (params, grads, momentum_buffer_list):
                tensors.clear()
        return sparse


class GD(SGD):
    r"""Gradient descent: SGD with the gradient of the *whole* training set in every step.

    :meth:`full_gradient` computes the gradient in chunks: the data need not fit in one batch. The
    limit of the non-uniformity is infinite.

    >>> import stableopt
    >>> model = nn.Linear(2, 1)
    >>> optimizer = stableopt.GD(model.parameters(), lr=0.1)
    >>> x, y = torch.ones(5, 2), torch.zeros(5, 1)
    >>> for _ in range(50):
    ...     loss = optimizer.full_gradient(model, nn.MSELoss(), (x, y), chunk_size=2)
    ...     optimizer.step()
    >>> loss < 1e-6
    True
    """

    def full_gradient(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        chunk_size: int | None = None,
        sample_weight: Tensor | Callable[[Any], Tensor] | None = None,
    ) -> float:
        r"""Set ``.grad`` to the gradient of the mean loss over all of ``data``; return that loss.

        .. math:: \nabla f = \sum_b \frac{w_b}{w} \nabla f_b

        over chunks b of weight :math:`w_b`, with :math:`w = \sum_b w_b`: the number of samples, or the
        sum of their weights if the loss weighs samples. Only the optimizer's parameters get gradients;
        ``zero_grad`` clears the earlier ones. The model stays in its mode, so that batch norm and
        dropout act on each chunk as in training.

        Args:
            model: the model.
            loss_fn: ``loss_fn(model(x), y)``, the mean over a chunk.
            data: an ``(x, y)`` pair, a ``Dataset``, a ``DataLoader`` or a re-iterable of batches.
            chunk_size: the largest number of samples at once; by default the batches of a loader,
                and 1,024 for pairs.
            sample_weight: the samples' weights, as for :class:`~stableopt.Problem`; not needed for
                torch's losses.

        Raises:
            TypeError: for data that can be read only once.
            ValueError: for empty data, a loss that is not a scalar, a loss that sums over samples, and a
                model whose parameters are not the optimizer's.
        """
        batches = Batches(data, chunk_size=chunk_size)
        weigher = ChunkWeights(model, loss_fn, batches, sample_weight)
        losses: list[Tensor] = []
        params = [p for group in self.param_groups for p in group["params"]]
        trainable = [p for p in params if p.requires_grad]
        to_device = partial(_to, device=params[0].device)
        first = total = 0.0
        with torch.enable_grad():
            for batch, size in batches:
                loss, weight = weigher.loss_and_weight(map_tensors(to_device, batch), size)
                if not total:
                    self.zero_grad()
                    first = weight
                if not weight:
                    continue
                # Weights are relative to the first chunk's until all data are read.
                weighted = loss * (weight / first)
                torch.autograd.backward(weighted, inputs=trainable)
                losses.append(weighted.detach())
                total += weight
        if total and all(p.grad is None for p in trainable):
            raise ValueError(
                "model: its loss gives none of the optimizer's parameters a gradient: expected the model"
                " that they belong to"
            )
        if not total:
            raise ValueError(f"data: all {batches.num_samples} samples have weight zero")
        if total != first:
            for p in params:
                if p.grad is not None:
                    p.grad.mul_(first / total)
        return float(torch.stack(losses).sum()) * (first / total)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
