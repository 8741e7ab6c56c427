"""`Tracking`: adds ``track``, ``monitor`` and ``margins`` to the optimizers of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from stableopt.curvature import Problem
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.stability import StabilityMargins

__all__ = ["Tracking"]


class Tracking:
    """Mixin for subclasses of ``torch.optim.Optimizer``; copies and pickles have no monitor."""

    def track(
        self,
        model: nn.Module | Problem,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        data: Any = None,
        **options: Any,
    ) -> StabilityMonitor:
        """Measure the stability margins while this optimizer trains ``model``.

        The arguments are those of :class:`~stableopt.monitor.monitor.StabilityMonitor`. A second call
        closes the first monitor.

        >>> import stableopt
        >>> model = nn.Linear(2, 1)
        >>> optimizer = stableopt.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
        >>> monitor = optimizer.track(model, nn.MSELoss(), (x, y), every=1)
        >>> nn.MSELoss()(model(x), y).backward(); optimizer.step()
        >>> optimizer.margins.sharpness_limit
        20.0
        """
        optimizer = cast(torch.optim.Optimizer, self)
        monitor = StabilityMonitor(optimizer, model, loss_fn, data, **options)
        former = self.monitor
        # Not in `state`: checkpoints must stay those of torch.optim. Optimizer.__getstate__ excludes
        # the attribute from copies and pickles.
        self._stability_monitor = monitor
        if former is not None:
            former.close()
        return monitor

    @property
    def monitor(self) -> StabilityMonitor | None:
        """The monitor of the latest :meth:`track`, or ``None``."""
        return getattr(self, "_stability_monitor", None)

    @property
    def margins(self) -> StabilityMargins | None:
        """The latest margins, or ``None`` before the first measurement."""
        return None if self.monitor is None else self.monitor.margins
