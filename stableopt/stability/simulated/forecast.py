r"""`Forecast`: how much replicas will grow on the samples that an epoch has left for them.

Each replica of a population draws all samples once in an epoch, in its own order. In the middle of an
epoch a replica is large mainly because contracting samples are still ahead of it. Selection by size
would keep such replicas, so selection weighs each size with the expected growth on the samples left,

.. math:: G(S) = \exp\sum_{i\in S} g_i,

where :math:`g_i` is the mean effect of sample i on the logarithm of the growth, learnt from the epochs
before. Any positive :math:`G` that is 1 at the end of an epoch leaves the population's growth unbiased
(a *twisted* particle filter: Whiteley & Lee, Ann. Statist. 42, 2014). A good one makes it accurate: in
one dimension with batches of one sample the weights of all replicas are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Forecast"]

_KEPT = 0.5
"""Weight of the epochs before the last: directions, and with them effects, change early on."""

_LARGEST = 300.0
"""Largest forecast of either sign: exponentials stay in the range of doubles."""

_LEAST = 1e-30
"""Smallest mean growth in a step: its logarithm stays finite where a batch maps all replicas to 0."""


class Forecast:
    """The expected logarithm of the growth in the rest of an epoch, up to a constant.

    Args:
        num_samples: samples n in an epoch.
        batch_size: samples B in a step.
        replicas: the number of replicas.
        device: the device of the replicas.
        drop_last: whether an epoch leaves out a smaller last batch.

    Attributes:
        log_growth: the forecast for each replica, ``(replicas,)``.

    >>> forecast = Forecast(2, 1, 2, torch.device("cpu"))
    >>> step = torch.tensor([[0], [1]]), torch.ones(2).double(), torch.tensor([4.0, 0.25]).double()
    >>> forecast.observe(*step, left=1)                # sample 0 multiplies by 4, and sample 1 by 1/4
    >>> forecast.begin_epoch()
    >>> forecast.observe(*step, left=1)
    >>> forecast.log_growth.exp()                      # sample 1 is left for replica 0
    tensor([0.2500, 4.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        replicas: int,
        device: torch.device,
        *,
        drop_last: bool = False,
    ) -> None:
        self._batch_size, self._ragged = batch_size, num_samples % batch_size
        self._drop_last = drop_last
        # Row 0 is for full batches, and row 1 for the smaller last one, in which a sample counts more.
        empty = torch.zeros(2, num_samples, dtype=torch.float64, device=device)
        self._growth, self._weight, self._effects = empty, empty.clone(), empty.clone()
        self._sums = torch.zeros(2, replicas, dtype=torch.float64, device=device)
        self.log_growth = self._sums[0]

    def begin_epoch(self) -> None:
        """Learn the effects of samples from past steps; all samples are left for each replica."""
        n = self._effects.shape[1]
        for row, size in enumerate((self._batch_size, self._ragged)):
            seen = self._weight[row] > 0
            if not bool(seen.any()):
                continue
            means = (self._growth[row] / self._weight[row]).clamp(min=_LEAST).log()
            deviations = torch.where(seen, means - means[seen].mean(), 0.0)
            # The other samples of its batch are rather those of opposite effect: all effects add up to
            # a constant.
            self._effects[row] = deviations * ((n - 1) / max(n - size, 1))
        self._growth *= _KEPT
        self._weight *= _KEPT
        self._sums = torch.zeros_like(self._sums)
        self.log_growth = self._sums[0]

    def observe(self, batch: Tensor, weights: Tensor, growth: Tensor, *, left: int) -> None:
        """Learn from a step, and update the forecast.

        Args:
            batch: the samples that each replica drew, ``(replicas, B)``.
            weights: each replica's weight in the means, up to a factor.
            growth: the factor by which the step multiplied each replica's squared norm.
            left: samples of the epoch that each replica has not drawn.
        """
        row = int(batch.shape[1] < self._batch_size)
        samples, weights = batch.flatten(), weights / weights.sum()
        for total, values in ((self._growth, weights * growth), (self._weight, weights)):
            total[row].index_add_(0, samples, values.repeat_interleave(batch.shape[1]))
        self._sums = self._sums - self._effects[:, batch].sum(2)
        if left <= (self._ragged if self._drop_last else 0):
            self.log_growth = torch.zeros_like(self._sums[0])
            return
        in_last = self._ragged / left  # the probability that a sample left is in the last batch
        last = torch.zeros_like(self._sums[1]) if self._drop_last else self._sums[1]
        log_growth = (1 - in_last) * self._sums[0] + in_last * last
        self.log_growth = log_growth.clamp(-_LARGEST, _LARGEST)

    def select(self, chosen: Tensor) -> None:
        """Keep the replicas with the indices ``chosen``."""
        self._sums, self.log_growth = self._sums[:, chosen], self.log_growth[chosen]
