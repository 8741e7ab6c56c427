"""Mean-square stability in several dimensions."""

from __future__ import annotations

from torch import Tensor

from stableopt.curvature import Hessian, NonUniformity, Operator

__all__ = ["SecondMomentBound"]


class SecondMomentBound(Operator):
    r"""The matrix :math:`(I-\eta H)^2 + \eta^2 p\,\Sigma` of Theorem 1's condition (8).

    Plain SGD is mean-square linearly stable if its largest eigenvalue is at most 1 (Wu, Ma & E,
    2018): sufficient in any dimension, necessary in one. The matrix bounds
    :math:`E\|(I-\eta H_B)x\|^2 = x^\top[(I-\eta H)^2+\eta^2p\Sigma]x`. Directions in which no sample
    curves have the eigenvalue 1, so with more parameters than nC the largest is never below it.

    Args:
        hessian: H at the point; with weight decay, :math:`H + \lambda I`.
        non_uniformity: Sigma at the same point.
        lr: learning rate eta.
        noise: p, :func:`~stableopt.stability.limits.noise_factor`.
        weight_decay: coupled weight decay lambda.

    >>> import torch
    >>> from stableopt.curvature import Problem
    >>> model = torch.nn.Linear(1, 1, bias=False).double()   # H = 5, Sigma = 9
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1).double()))
    >>> bound = SecondMomentBound(Hessian(problem), NonUniformity(problem), lr=0.1, noise=0.5)
    >>> bound @ torch.ones(1).double()                        # (1 - .5)^2 + .01 * .5 * 9
    tensor([0.2950], dtype=torch.float64)
    """

    def __init__(
        self,
        hessian: Hessian,
        non_uniformity: NonUniformity,
        *,
        lr: float,
        noise: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(hessian.shape[0], hessian.dtype, hessian.device)
        self._hessian, self._non_uniformity = hessian, non_uniformity
        self._lr, self._noise, self._weight_decay = lr, noise, weight_decay

    def _contract(self, vector: Tensor) -> Tensor:
        decayed = vector * (1 - self._lr * self._weight_decay)
        return decayed - self._lr * (self._hessian @ vector)

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``."""
        mean = self._contract(self._contract(vector))
        if self._noise == 0:
            return mean
        return mean + self._lr**2 * self._noise * (self._non_uniformity @ vector)
