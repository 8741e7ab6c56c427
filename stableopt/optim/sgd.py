"""Stochastic and full-batch gradient descent, bit for bit ``torch.optim.SGD``, that can be tracked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.problem.data import Batches, map_tensors
from stableopt.optim.trackable import Tracking

__all__ = ["GD", "SGD"]


class SGD(Tracking, torch.optim.SGD):
    """``torch.optim.SGD`` with ``track`` and ``margins``; same arguments, same numbers.

    ``step`` is torch's own, so hooks, schedulers, scalers and compilation see what they expect. One
    repair: a first fused step that a gradient scaler skips does not leave momentum buffers with
    whatever the memory held, as torch 2.13 does.

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
        # The kernel would leave new buffers unwritten where the scaler found an infinity. Asking
        # costs one host transfer, and only until there are buffers.
        if group["fused"] and unset and found_inf is not None and bool(found_inf):
            for empty in (params, grads, momentum_buffer_list):
                empty.clear()
        return sparse


class GD(SGD):
    r"""Gradient descent: SGD whose every step takes the gradient of the *whole* training set.

    :meth:`full_gradient` computes it in chunks, so the data need not fit one batch. Its
    non-uniformity has no limit, and margins say infinity.

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
    ) -> float:
        r"""Set ``.grad`` to the gradient of the mean loss over all of ``data``; return that loss.

        .. math:: \nabla f = \sum_b \frac{m_b}{n} \nabla f_b

        over chunks b of :math:`m_b` samples. Earlier gradients are dropped, as by ``zero_grad``; the
        model stays in its mode, so batch norm and dropout act chunk by chunk as in training.

        Args:
            model: the model.
            loss_fn: ``loss_fn(model(x), y)``, the mean over a chunk.
            data: an ``(x, y)`` pair, a ``Dataset``, a ``DataLoader`` or a re-iterable of batches.
            chunk_size: the most samples at once; by default loader batches as they are, and pairs
                cut at 1,024.

        Raises:
            TypeError: for data that can be read only once.
            ValueError: for empty data, or a loss that is not a scalar.
        """
        device = self.param_groups[0]["params"][0].device
        losses: list[Tensor] = []
        first = total = 0
        with torch.enable_grad():
            for batch, size in Batches(data, chunk_size=chunk_size):
                x, y = map_tensors(lambda t: t.to(device, non_blocking=True), batch)
                loss = loss_fn(model(x), y)
                if loss.dim() != 0:
                    raise ValueError(
                        f"loss_fn returned shape {tuple(loss.shape)}: expected a scalar, the mean"
                        " over the batch (reduction='mean')"
                    )
                if not total:
                    self.zero_grad()
                    first = size
                # n is known when all is read; until then the first chunk is the unit.
                part = loss * (size / first)
                torch.autograd.backward(part)
                losses.append(part.detach())
                total += size
        if total != first:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(first / total)
        return float(torch.stack(losses).sum()) * (first / total)
