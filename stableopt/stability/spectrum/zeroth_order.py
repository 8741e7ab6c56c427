"""`zeroth_order_lr`: bounds of the critical learning rate of zeroth-order gradient descent."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["ZerothOrderLR", "zeroth_order_lr"]


class ZerothOrderLR(NamedTuple):
    """Bounds of the critical learning rate of zeroth-order gradient descent.

    Attributes:
        lower: at or below this learning rate it is stable in mean square.
        upper: at or above this learning rate it is unstable.
    """

    lower: float
    upper: float


def zeroth_order_lr(trace: float, sharpness: float) -> ZerothOrderLR:
    r"""Return bounds of the critical learning rate of gradient descent on losses alone, as in MeZO.

    The step :math:`\theta\leftarrow\theta-\eta\,(z^\top\nabla f)\,z` with a normal z (Malladi et al.,
    *Fine-tuning language models with just forward passes*, 2023) is stable in mean square near a minimum
    if :math:`\sum_j \eta\lambda_j/(1-\eta\lambda_j) \le 2`, so that

    .. math:: \frac{2}{\mathrm{tr}\,H + 2\lambda_{\max}} \le \eta^\star \le \frac{2}{\mathrm{tr}\,H}

    (Song et al., *Zeroth-order optimization at the edge of stability*, arXiv:2604.14669). The limit
    :math:`2/\eta` is on the trace; that of gradient descent is on the largest eigenvalue.

    Args:
        trace: the trace of the Hessian, ``margins["trace"].value``.
        sharpness: the largest eigenvalue of the Hessian.

    Both bounds are infinite if neither number is positive.

    >>> zeroth_order_lr(trace=90.0, sharpness=5.0)
    ZerothOrderLR(lower=0.02, upper=0.022222222222222223)
    """
    total = trace + 2 * max(sharpness, 0.0)
    return ZerothOrderLR(
        lower=2 / total if total > 0 else math.inf,
        upper=2 / trace if trace > 0 else math.inf,
    )
