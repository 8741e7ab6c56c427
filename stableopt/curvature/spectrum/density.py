r"""`spectral_density`: the distribution of an operator's eigenvalues.

Stochastic Lanczos quadrature (Golub & Welsch, 1969; Lin, Saad & Yang, *Approximating spectral densities
of large matrices*, 2016; Ghorbani, Krishnan & Xiao, *An investigation into neural net optimization via
Hessian eigenvalue density*, 2019): m steps of Lanczos from a start z of random signs give Ritz values
:math:`\theta_j` with Ritz vectors of coordinates :math:`y_j`. For any function f

.. math::
    \tfrac1d\,\mathrm{tr} f(A) = \tfrac1d E[z^\top f(A) z]
    \approx \mathrm{mean}_z \sum_j (e_1^\top y_j)^2 f(\theta_j)

Two examples::

    density = spectral_density(Hessian(problem))     # 5 starts of 50 products
    density.cumulative(torch.tensor([0.0]))          # share of eigenvalues below zero
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt._support.arguments import whole
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.eigen.lanczos import LanczosIteration
from stableopt.curvature.operator import Operator

__all__ = ["SpectralDensity", "spectral_density"]


@dataclass(frozen=True)
class SpectralDensity:
    r"""An estimate of the distribution of eigenvalues.

    Attributes:
        nodes: Ritz values :math:`\theta` of all starts, smallest first.
        weights: the share of eigenvalues at each node; they sum to 1.
        width: default standard deviation of the Gaussians in :meth:`density`: the range of the nodes
            divided by the steps of a start.
        size: the dimension d.
        products: products with the operator.

    >>> density = SpectralDensity((0.0, 4.0), (0.75, 0.25), width=0.5, size=8, products=2)
    >>> density.cumulative(torch.tensor([-1.0, 0.5, 4.0]))
    tensor([0.0000, 0.7500, 1.0000], dtype=torch.float64)
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    width: float
    size: int
    products: int

    def density(self, grid: Tensor, width: float | None = None) -> Tensor:
        """Return the density at ``grid`` ``(n,)``, by Gaussians of standard deviation ``width``.

        Raises:
            ValueError: for a width that is not positive, such as the default if all nodes are equal.
        """
        width = self.width if width is None else width
        if not 0 < width < math.inf:
            raise ValueError(
                f"width={width}: expected a positive number; cumulative() needs no width"
            )
        nodes, weights = self._tensors(grid.device)
        distances = (grid.double()[:, None] - nodes) / width
        gaussians = torch.exp(-distances.square() / 2) / (width * math.sqrt(2 * math.pi))
        return gaussians @ weights

    def cumulative(self, grid: Tensor) -> Tensor:
        """Return the share of eigenvalues at or below each of ``grid`` ``(n,)``, a step function."""
        nodes, weights = self._tensors(grid.device)
        return (grid.double()[:, None] >= nodes).double() @ weights

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        pairs = [self.nodes, self.weights]
        nodes, weights = torch.tensor(pairs, dtype=torch.float64, device="cpu").to(device)
        return nodes, weights


def spectral_density(
    operator: Operator, *, starts: int = 5, steps: int = 50, seed: int = 0
) -> SpectralDensity:
    """Return the distribution of the eigenvalues of a symmetric ``operator``.

    Args:
        operator: any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``@``. For a diagonal
            preconditioner, use the Hessian of :meth:`Problem.transformed`.
        starts: the number of random starts. The statistical error is of order 1 / sqrt(starts * d).
        steps: products per start, and vectors of length d held. Features narrower than the range of the
            spectrum divided by ``steps`` are not resolved.
        seed: of the starts; torch's global generators are not used.

    Raises:
        ValueError: for arguments out of range.
        NonFiniteError: if a product holds an infinity or a NaN.

    >>> class Diagonal(Operator):
    ...     def product(self, vector):
    ...         return torch.arange(200.0) * vector
    >>> found = spectral_density(Diagonal(200, torch.float32, torch.device("cpu")))
    >>> share = float(found.cumulative(torch.tensor([99.5])))       # half of them
    >>> abs(share - 0.5) < 0.04
    True
    """
    starts, steps = whole("starts", starts), whole("steps", steps)
    inner = InnerProduct.for_operator(operator)
    size = inner.whole_size(operator.shape[0])
    if size == 0:
        raise ValueError("operator has shape (0, 0): expected at least one dimension")
    nodes, weights, products = [], [], 0
    with torch.autocast(operator.device.type, enabled=False):
        for draw in range(starts):
            start = inner.dual(inner.signs(operator, seed, draw)).normalised()
            iteration = LanczosIteration(operator, inner, start, min(steps, size), seed)
            iteration.step()
            # The Ritz pairs of an invariant subspace are the start's whole spectral measure.
            while iteration.products < min(steps, size) and not iteration.invariant:
                iteration.extend()
                iteration.step()
            nodes.append(iteration.ritz_values * iteration.unit)
            weights.append(iteration.ritz_coordinates[0].square() / starts)
            products += iteration.products
    all_nodes, order = torch.cat(nodes).sort()
    all_weights = torch.cat(weights)[order]
    width = float(all_nodes[-1] - all_nodes[0]) / steps
    return SpectralDensity(
        tuple(all_nodes.tolist()), tuple(all_weights.tolist()), width, size, products
    )
