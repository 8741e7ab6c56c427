r"""`PrincipalBlock`: the block of a Hessian for some of the parameters, such as those of one layer.

.. math:: D_b(\pm H_{bb} + \Lambda_b)D_b

All blocks of one Hessian share its cached passes; a product differentiates only the block's gradients.
Several blocks cannot share one product: in :math:`Hv` of a sum of vectors, one for each block,
:math:`H_{bb}v_b` is mixed with :math:`H_{bc}v_c`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from stableopt.curvature.operator import Operator
from stableopt.curvature.problem.coordinates import Coordinates
from stableopt.curvature.products.hessian import Hessian
from stableopt.curvature.products.sharded_hessian import ShardedHessian

__all__ = ["PrincipalBlock", "coordinates_of"]


def coordinates_of(whole: Coordinates, places: Sequence[int]) -> Coordinates:
    """Return the coordinates of the parameters at ``places``."""
    return replace(
        whole,
        names=[whole.names[place] for place in places],
        shapes=[whole.shapes[place] for place in places],
        scale=tuple(whole.scale[place] for place in places),
        weight_decay=tuple(whole.weight_decay[place] for place in places),
    )


class PrincipalBlock(Operator):
    """The principal block of a Hessian for the parameters at ``places``.

    Args:
        hessian: the Hessian.
        places: indices of parameters in its problem, increasing.
        coordinates: the coordinates of these parameters; by default the Hessian's.

    >>> import torch
    >>> from stableopt.curvature import Problem
    >>> model = torch.nn.Linear(2, 1).double()
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
    >>> hessian = Hessian(Problem(model, torch.nn.MSELoss(), (x, y)))
    >>> PrincipalBlock(hessian, [0]) @ torch.eye(2).double()     # the weight, without the bias
    tensor([[1., 0.],
            [0., 4.]], dtype=torch.float64)
    """

    def __init__(
        self,
        hessian: Hessian | ShardedHessian,
        places: Sequence[int],
        coordinates: Coordinates | None = None,
    ) -> None:
        problem = hessian.problem
        if coordinates is None:
            coordinates = coordinates_of(problem.coordinates, places)
        size = sum(shape.numel() for shape in coordinates.shapes)
        super().__init__(size, hessian.dtype, hessian.device)
        self._hessian, self._places, self._coordinates = hessian, tuple(places), coordinates
        self.inner_product = hessian.inner_product
        if problem.sharded:
            sharded_size = sum(problem.params[place].numel() for place in places)
            self.inner_product = replace(hessian.inner_product, sharded_size=sharded_size)

    def product(self, vector: Tensor) -> Tensor:
        """Return the block times ``vector``, of the block's size."""
        return self._hessian.block_product(self._places, self._coordinates, vector)
