"""`SecondMomentExcess`: the sufficient condition of Theorem 1 for mean-square stability."""

from __future__ import annotations

from torch import Tensor

from stableopt.curvature import Hessian, NonUniformity, Operator

__all__ = ["SecondMomentExcess"]


class SecondMomentExcess(Operator):
    r"""The matrix :math:`(I-\eta H)^2 + \eta^2 p\,\Sigma - I` of Theorem 1's condition (8).

    Plain SGD is mean-square linearly stable if the largest eigenvalue of this matrix is at most 0 (Wu,
    Ma & E, 2018). The condition is sufficient in any dimension, and necessary in one. Condition (8)
    bounds the largest eigenvalue without ``- I`` by 1, since
    :math:`E\|(I-\eta H_B)x\|^2 = x^\top[(I-\eta H)^2+\eta^2p\Sigma]x`. Directions without curvature
    have the eigenvalue 0, so with more parameters than nC the largest eigenvalue is at least 0. A random
    vector lies almost entirely in these directions, so tolerances must be relative to the excess.

    Args:
        hessian: H at a point.
        non_uniformity: Sigma at the same point.
        lr: learning rate eta.
        noise: p, :func:`~stableopt.stability.rules.limits.noise_factor`.
        weight_decay: coupled weight decay lambda, which turns H into :math:`H + \lambda I`.

    >>> import torch
    >>> from stableopt.curvature import Problem
    >>> model = torch.nn.Linear(1, 1, bias=False).double()   # H = 5, Sigma = 9
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1).double()))
    >>> excess = SecondMomentExcess(Hessian(problem), NonUniformity(problem), lr=0.1, noise=0.5)
    >>> excess @ torch.ones(1).double()                       # (1 - .5)^2 + .01 * .5 * 9 - 1
    tensor([-0.7050], dtype=torch.float64)
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
        self.inner_product = hessian.inner_product
        self._hessian, self._non_uniformity = hessian, non_uniformity
        self._lr, self._noise, self._weight_decay = lr, noise, weight_decay

    def _step(self, vector: Tensor) -> Tensor:
        """Return eta (H + lambda I) times ``vector``."""
        return self._lr * (self._hessian @ vector + self._weight_decay * vector)

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``."""
        step = self._step(vector)
        mean = self._step(step) - 2 * step
        if self._noise == 0:
            return mean
        return mean + self._lr**2 * self._noise * (self._non_uniformity @ vector)
