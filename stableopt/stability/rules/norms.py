r"""Norms of normalised steepest descent (signs, Lion, Muon), as linear minimisation oracles.

Sign descent, Lion and Muon step by :math:`\theta\leftarrow\theta-\eta\,\mathrm{LMO}(g)`, where the
linear minimisation oracle, up to its sign, is
:math:`\mathrm{LMO}(g)=\arg\max_{N(d)\le1}\langle g,d\rangle`. The inner product
:math:`\langle g,\mathrm{LMO}(g)\rangle = \|g\|_\star` is the dual norm. Two examples::

    SignNorm(params, lr=1e-3)                        # |d_i| <= r_i: signs, radii of 1
    SpectralNorm(params, radii, lr=0.02)             # singular values of D_l at most r_l: Muon

The Hessian's eigenvalues do not limit such steps. The generalised sharpness does:
:func:`~stableopt.stability.generalised_sharpness`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from stableopt.stability.rules.preconditioner import UnknownStep

__all__ = ["NewtonSchulzNorm", "NormedStep", "SignNorm", "SpectralNorm", "StepNorm"]

N = TypeVar("N", bound="StepNorm")


class StepNorm(abc.ABC):
    r"""A norm :math:`N(d) = \max_l N_l(d_l)/r_l` over parameters, with a radius for each.

    Args:
        params: the parameters.
        radii: a number for each parameter, 1 by default. An entrywise norm also takes tensors of the
            parameters' shapes. A parameter of radius 0 does not move.
        lr: the learning rate: a step is ``lr`` times :meth:`oracle`.

    Raises:
        ValueError: for radii that do not match the parameters, and a negative ``lr`` or radius.
    """

    entrywise = False
    exact = True
    """Whether :meth:`unit_oracle` is the oracle of the norm, not an approximation."""

    def __init__(
        self,
        params: Iterable[Tensor],
        radii: Iterable[Tensor | float] | None = None,
        *,
        lr: float,
    ) -> None:
        self.params = tuple(params)
        self.radii = (1.0,) * len(self.params) if radii is None else tuple(radii)
        self.lr = float(lr)
        if not self.lr >= 0:
            raise ValueError(f"lr={lr}: expected at least 0")
        if len(self.radii) != len(self.params):
            raise ValueError(
                f"radii has {len(self.radii)} values: expected one for each of the"
                f" {len(self.params)} parameters"
            )
        for p, radius in zip(self.params, self.radii, strict=True):
            if isinstance(radius, Tensor) and not (self.entrywise and radius.shape == p.shape):
                raise ValueError(
                    f"radii: {tuple(radius.shape)} for a parameter of shape {tuple(p.shape)}:"
                    f" expected a number{', or the same shape' if self.entrywise else ''}"
                )
        if not _all_nonnegative(self.radii):
            negative = next(r for r in self.radii if not _all_nonnegative([r]))
            raise ValueError(f"radii: {negative} is negative: expected at least 0")

    @abc.abstractmethod
    def unit_oracle(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the oracle of one parameter's norm with radius 1, and its dual norm."""

    def oracle(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the element of the unit ball with the largest inner product with ``tensors``."""
        return [r * self.unit_oracle(r * t)[0] for r, t in self._with_radii(tensors)]

    def dual_norm(self, tensors: Sequence[Tensor]) -> float:
        """Return the inner product of ``tensors`` with their :meth:`oracle`."""
        duals = [self.unit_oracle(r * t)[1].double() for r, t in self._with_radii(tensors)]
        return float(torch.stack(duals).sum()) if duals else 0.0

    def over(self: N, params: Sequence[Tensor]) -> N:
        """Return the norm on ``params``, with a radius of 0 for parameters that the norm lacks."""
        radii = {id(p): r for p, r in zip(self.params, self.radii, strict=True)}
        return type(self)(params, [radii.get(id(p), 0.0) for p in params], lr=self.lr)

    def _with_radii(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor | float, Tensor]]:
        pairs = zip(self.radii, tensors, strict=True)
        return [(r.to(t) if isinstance(r, Tensor) else r, t) for r, t in pairs]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.params)} parameters, lr={self.lr:g})"


class SignNorm(StepNorm):
    r"""The norm of signs, :math:`N(d) = \max_i |d_i|/r_i`, with :math:`\|g\|_\star = \sum_i r_i|g_i|`.

    >>> norm = SignNorm([torch.zeros(3)], [torch.tensor([1.0, 2.0, 3.0])], lr=0.1)
    >>> gradient = [torch.tensor([-4.0, 0.5, 0.0])]
    >>> norm.oracle(gradient), norm.dual_norm(gradient)
    ([tensor([-1.,  2.,  0.])], 5.0)
    """

    entrywise = True

    def unit_oracle(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signs and the sum of absolute values."""
        return tensor.sign(), tensor.abs().sum()


class SpectralNorm(StepNorm):
    r"""The norm of singular values, :math:`N(D) = \max_l \|D_l\|_2/r_l`.

    The oracle of a matrix :math:`G = U S V^\top` is its polar factor :math:`UV^\top`, and
    :math:`\|G\|_\star = \sum_l r_l \operatorname{tr} S_l`. Dimensions after the first are
    flattened into one. Vectors get a radius of 0.

    >>> norm = SpectralNorm([torch.zeros(2, 2)], [2.0], lr=0.1)
    >>> norm.dual_norm([torch.tensor([[0.0, 3.0], [1.0, 0.0]])])
    8.0
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        radii: Iterable[Tensor | float] | None = None,
        *,
        lr: float,
    ) -> None:
        super().__init__(params, radii, lr=lr)
        pairs = zip(self.params, self.radii, strict=True)
        self.radii = tuple(radius if p.dim() > 1 else 0.0 for p, radius in pairs)

    def unit_oracle(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the polar factor and the sum of the singular values."""
        if tensor.dim() < 2:
            return torch.zeros_like(tensor), tensor.new_zeros(())
        left, values, right = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
        # Leave out singular vectors of singular value zero: they are rounding errors.
        rounding = values[:1] * max(tensor.shape) * torch.finfo(tensor.dtype).eps
        polar = (left * (values > rounding)) @ right
        return polar.view_as(tensor), values.sum()


class NewtonSchulzNorm(SpectralNorm):
    r"""The spectral norm, with a few Newton–Schulz iterations as an approximate oracle.

    The exact oracle maps the singular values :math:`\sigma` of :math:`G/\|G\|_F` to 1. This one maps
    them to :math:`\varphi(\sigma)`, by k iterations of
    :math:`\sigma \leftarrow a\sigma + b\sigma^3 + c\sigma^5`. It is not the oracle of any norm, and its
    image is not a ball, so a maximum over it may be larger than any value of a run. The dual norm is
    replaced by :math:`\langle G, \varphi(G)\rangle`.

    Args:
        params: the parameters.
        radii: a number for each, as for :class:`SpectralNorm`.
        lr: the learning rate.
        coefficients: a, b and c.
        steps: iterations k.

    >>> norm = NewtonSchulzNorm([torch.zeros(1, 1)], lr=0.1)
    >>> [round(number.item(), 3) for number in norm.unit_oracle(torch.tensor([[5.0]]))]
    [0.696, 3.482]
    """

    exact = False

    def __init__(
        self,
        params: Iterable[Tensor],
        radii: Iterable[Tensor | float] | None = None,
        *,
        lr: float,
        coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        steps: int = 5,
    ) -> None:
        super().__init__(params, radii, lr=lr)
        self.coefficients, self.steps = coefficients, steps

    def over(self, params: Sequence[Tensor]) -> NewtonSchulzNorm:
        """Return the norm on ``params``, with a radius of 0 for parameters that the norm lacks."""
        norm = super().over(params)
        norm.coefficients, norm.steps = self.coefficients, self.steps
        return norm

    def unit_oracle(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of the map, and its inner product with ``tensor``."""
        if tensor.dim() < 2:
            return torch.zeros_like(tensor), tensor.new_zeros(())
        left, values, right = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
        image = self.mapped(values / values.norm().clamp_min(torch.finfo(values.dtype).tiny))
        return ((left * image) @ right).view_as(tensor), values @ image

    def mapped(self, values: Tensor) -> Tensor:
        """Return the singular values after the iterations, from ``values`` of at most 1."""
        a, b, c = self.coefficients
        for _ in range(self.steps):
            values = a * values + b * values**3 + c * values**5
        return values


class NormedStep(UnknownStep):
    """The placeholder of P for normalised steps, which the Hessian's eigenvalues do not limit.

    Args:
        norm: the norm in which the optimizer descends.
        name: the optimizer's name.
    """

    def __init__(self, norm: StepNorm, name: str) -> None:
        super().__init__(
            f"{name} takes steps of a length that does not depend on the gradient, which eigenvalues"
            " of the Hessian do not limit; measure generalised_sharpness"
        )
        self.norm = norm


def _all_nonnegative(radii: Sequence[Tensor | float]) -> bool:
    """Return whether all radii are at least 0, with one transfer to the host."""
    tensors = [(r >= 0).all() for r in radii if isinstance(r, Tensor)]
    numbers = [r >= 0 for r in radii if not isinstance(r, Tensor)]
    return all(numbers) and (not tensors or bool(torch.stack(tensors).all()))
