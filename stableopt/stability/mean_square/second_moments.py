r"""`NoiseGain`, `MomentGain`: the recursion of second moments near a minimum, as symmetric operators.

All matrices are in the eigenbasis of the mean curvature H, whose eigenvalues are :math:`h_a`. The noise
of one step adds :math:`p\,(\frac1n\sum_i H_iXH_i - HXH)` to the second moment :math:`X = E[xx^\top]`,
and the contraction of the update rule shrinks X. Constant gradient noise of covariance Z and the
contraction balance at :math:`X_{ab} = Z_{ab}/w_{ab}`. The point is therefore stable exactly if

.. math:: w \circ X - p\,\Bigl(\tfrac1n\sum_i H_iXH_i - HXH\Bigr)

is a positive semi-definite map of symmetric X. Only the weights w (:func:`mode_weights`) depend on the
update rule. For plain SGD, where :math:`w_{ab} = (h_a + h_b)/\eta - h_ah_b`, this is the criterion of
Mulayoff & Michaeli (*Exact mean square linear stability analysis for SGD*, COLT 2024).

Gauss–Newton matrices are :math:`F_i^\top F_i`, where :math:`F_i` has C rows. The map is then positive
exactly if the much smaller :class:`NoiseGain`, on one C x C matrix per sample, has no eigenvalue above
1. For Hessians, which may be indefinite, :class:`MomentGain` is the same test on X itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.curvature import Operator
from stableopt.curvature.gram.gram import Modes
from stableopt.stability.rules.limits import LinearStep

__all__ = [
    "HessianModes",
    "MomentGain",
    "NoiseGain",
    "gather",
    "mode_weights",
    "sandwich",
    "weight_corrections",
]

_CONVERGED = 1e-6
"""Largest relative residual of an eigenvector that counts as exact. It changes a threshold by about as
much."""


def mode_weights(eigenvalues: Tensor, others: Tensor, step: LinearStep) -> Tensor:
    r"""Return :math:`w_{ab}`: under gradient noise of covariance Z, :math:`X_{ab} = Z_{ab}/w_{ab}`.

    With :math:`u = \eta h_a` and :math:`v = \eta h_b`, where h includes weight decay and :math:`\eta`
    stands for :math:`\eta(1-\tau)`:

    - heavy ball, and plain SGD with :math:`\beta = 0`:
      :math:`\eta^2 w = (1-\beta)\bigl(u + v - \frac{uv}{1+\beta}\bigr)
      + \frac{\beta(u-v)^2}{1-\beta^2}`;
    - Nesterov: :math:`\eta^2 w =
      \frac{(1-\beta^2 q_aq_b)^2 - (1+\beta)^2q_aq_b(1-\beta q_a)(1-\beta q_b)}
      {((1+\beta)^2+\beta^2)(1-\beta^2q_aq_b) - \beta(1+\beta)^2(q_a+q_b-2\beta q_aq_b)}`,
      :math:`q = 1 - \eta h`, computed without the cancellation at small :math:`\eta h`.

    It is the reciprocal of :math:`\sum_k g_k(a)g_k(b)`, where g is a mode's impulse response. Where all
    modes are stable it is positive and decreases in :math:`\eta`.

    >>> h = torch.tensor([1.0, 2.0])
    >>> mode_weights(h[:, None], h, LinearStep(0.5))            # (h_a + h_b) / lr - h_a h_b
    tensor([[3., 4.],
            [4., 4.]])
    """
    beta, scale = step.momentum, step.lr * step.gain
    u, v = scale * (eigenvalues + step.weight_decay), scale * (others + step.weight_decay)
    total, product = u + v, u * v
    if not step.nesterov:
        common = (1 - beta) * (total - product / (1 + beta))
        return (common + beta * (u - v) ** 2 / (1 - beta**2)) / scale**2
    m = total - product  # 1 - q_a q_b
    numerator = (1 - beta**2) * (1 - beta) * total + beta**4 * m**2
    numerator += (1 + beta) ** 2 * m * (beta * (1 - beta) * total + beta**2 * product)
    numerator -= (1 - beta**4 + (beta + beta**2) ** 2) * product
    denominator = 1 - beta**2 + ((1 + beta) ** 2 + beta**2) * beta**2 * m
    denominator += beta * (1 + beta) ** 2 * (total - 2 * beta * m)
    return numerator / denominator / scale**2


class NoiseGain(Operator):
    r"""The gain of noise over one round of contraction and new noise: stable up to eigenvalue 1.

    .. math:: S \mapsto \Bigl\{\tfrac pn F_i\,[(\textstyle\sum_j F_j^\top S_jF_j)/V]\,F_i^\top\Bigr\}_i,
        \qquad V_{ab} = w_{ab} + p\,h_ah_b

    on one ``(C, C)`` matrix S per sample, flattened; the division is entrywise. The map is symmetric and
    preserves positive semi-definite S. The Rayleigh quotient of any S is a lower bound of the largest
    eigenvalue. For positive definite S, any t with gain(S) at most t S is an upper bound (Collatz,
    Wielandt).

    Args:
        modes: the samples' curvature, ``(n, C, r)``.
        weights: V, ``(r, r)``.
        noise: p, :func:`~stableopt.stability.rules.limits.noise_factor`.

    A product takes :math:`4nCr^2` operations and memory for three matrices of V's size.

    >>> modes = Modes.from_factors(torch.tensor([[[1.0]], [[2.0]]]))   # h_i = 1 and 4, H = 5/2
    >>> h, p, step = modes.eigenvalues, 1.0, LinearStep(0.5)
    >>> gain = NoiseGain(modes, mode_weights(h[:, None], h, step) + p * h[:, None] * h, p)
    >>> gain @ torch.ones(2).double()             # (1/n) f_i^2 (f_1^2 + f_2^2) / 10
    tensor([0.2500, 1.0000], dtype=torch.float64)
    """

    def __init__(self, modes: Modes, weights: Tensor, noise: float) -> None:
        n, outputs, _ = modes.factors.shape
        super().__init__(n * outputs**2, torch.float64, modes.factors.device)
        self._factors, self._weights, self._noise = modes.factors, weights, noise

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(nC^2,)``."""
        return self.spread(gather(self._factors, vector))

    def spread(self, gathered: Tensor) -> Tensor:
        """Return the second half of a product, from the result of :func:`gather`."""
        factors = self._factors
        n = factors.shape[0]
        rows = (factors.flatten(0, 1) @ (gathered / self._weights)).view_as(factors)
        return (rows @ factors.mT).mul_(self._noise / n).flatten()


def gather(factors: Tensor, vector: Tensor) -> Tensor:
    r"""Return :math:`\sum_i F_i^\top S_iF_i`, ``(r, r)``, for the matrices S in ``vector``."""
    n, outputs, _ = factors.shape
    products = vector.view(n, outputs, outputs) @ factors
    return factors.flatten(0, 1).T @ products.flatten(0, 1)


@dataclass(frozen=True)
class HessianModes:
    r"""The positive eigenvalues of the mean Hessian, and the samples' Hessians in its eigenbasis.

    :math:`\frac1n\sum_i A_i = \mathrm{diag}(\text{eigenvalues})`, in double precision. Every matrix
    includes the weight decay.

    Attributes:
        eigenvalues: positive eigenvalues of the mean, ascending, ``(r,)``.
        blocks: :math:`A_i`, ``(n, r, r)``, symmetric and possibly indefinite.
        residual_bounds: :math:`e_a \ge 0` ``(r,)``. :math:`\mathrm{diag}(e)` bounds the Gram
            matrix of the eigenvectors' residuals :math:`Hq_a - h_aq_a`; zero for exact eigenvectors.
    """

    eigenvalues: Tensor
    blocks: Tensor
    residual_bounds: Tensor


def sandwich(blocks: Tensor, matrix: Tensor) -> Tensor:
    r"""Return :math:`\frac1n\sum_i A_iXA_i` for symmetric A ``(n, r, r)`` and X ``(r, r)``."""
    n, r, _ = blocks.shape
    left = (blocks @ matrix).transpose(0, 1).reshape(r, n * r)
    return left @ blocks.reshape(n * r, r) / n


class MomentGain(Operator):
    r"""The share of a second moment that noise restores per step: stable up to eigenvalue 1.

    .. math:: Y \mapsto V^{-1/2} \circ \tfrac pn \textstyle\sum_i A_i\,(V^{-1/2} \circ Y)\,A_i,
        \qquad V_{ab} = w_{ab} + p\,h_ah_b

    on symmetric ``(r, r)`` matrices, flattened. The map is symmetric, and similar to
    :math:`X \mapsto V^{-1} \circ \frac pn\sum_i A_iXA_i`. The latter preserves positive semi-definite X
    if the entrywise inverse 1/V is positive semi-definite, as it is for exact modes.

    Args:
        blocks: :math:`A_i`, ``(n, r, r)``.
        weights: V, ``(r, r)``.
        noise: p, :func:`~stableopt.stability.rules.limits.noise_factor`.

    A product takes :math:`4nr^3` operations.

    >>> samples = torch.tensor([[[3.0]], [[-1.0]]]).double()              # mean square 5
    >>> MomentGain(samples, torch.tensor([[10.0]]).double(), noise=1.0) @ torch.ones(1).double()
    tensor([0.5000], dtype=torch.float64)
    """

    def __init__(self, blocks: Tensor, weights: Tensor, noise: float) -> None:
        super().__init__(blocks.shape[1] ** 2, torch.float64, blocks.device)
        self._blocks, self._roots, self._noise = blocks, weights.rsqrt(), noise

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(r^2,)``."""
        # Use the symmetric part only: a random start is not symmetric.
        matrix = vector.view_as(self._roots)
        moment = self._roots * (matrix + matrix.T) / 2
        return (self._noise * self._roots * sandwich(self._blocks, moment)).flatten()


def weight_corrections(
    eigenvalues: Tensor, residual_bounds: Tensor, step: LinearStep
) -> Iterator[tuple[Tensor, Tensor | float]]:
    r"""Yield sets of Ritz vectors, and the corrections ``(k, k)`` or 0 that make their weights a bound.

    In approximate eigenvectors a second moment contracts more than :func:`mode_weights` says, because of
    the residuals R. Three cases:

    - Plain SGD needs no correction.
    - The heavy ball's weights contain :math:`\frac{\beta}{1-\beta^2}(h_a-h_b)^2`. The square of H,
      restricted to Ritz vectors, is :math:`\mathrm{diag}(h^2) + R^\top R`, which gives the correction.
    - For Nesterov's momentum, whose weights are not polynomials, no bound is known: only vectors that
      are exact up to rounding are used, if there are any.

    Smaller sets have smaller corrections, but fewer second moments, so three sizes are tried.

    Args:
        eigenvalues: Ritz values ``(r,)``.
        residual_bounds: r times the squared norm of each residual, ``(r,)``; as a diagonal matrix they
            bound :math:`R^\top R`.
        step: the update rule.
    """
    exact = residual_bounds <= _CONVERGED**2 * eigenvalues**2
    if step.momentum == 0 or bool(exact.all()):
        yield torch.arange(len(residual_bounds), device=residual_bounds.device), 0.0
    elif step.nesterov:
        if bool(exact.any()):
            yield exact.nonzero().flatten(), 0.0
    else:
        factor = step.momentum / (1 - step.momentum**2)
        order = (residual_bounds / eigenvalues**2).argsort()
        for count in {len(order), (len(order) + 1) // 2, (len(order) + 3) // 4}:
            kept = order[:count].sort().values
            correction = factor * residual_bounds[kept] * count / len(order)
            yield kept, correction.unsqueeze(1) + correction
