"""`SGD`, `GD` and `LBFGS`: drop-in optimizers of torch that measure their stability margins."""

import importlib
from typing import TYPE_CHECKING, Any

from stableopt.optim.sgd import GD, SGD
from stableopt.stability import UpdateRule
from stableopt.stability.rules.readers.lbfgs import read_lbfgs
from stableopt.stability.rules.readers.sgd import read_sgd

if TYPE_CHECKING:
    from stableopt.optim.lbfgs import LBFGS

__all__ = ["GD", "LBFGS", "SGD"]

UpdateRule.register(GD, lambda optimizer: read_sgd(optimizer, full_batch=True))
# By name, since it is imported on demand; it overrides the step of torch's.
UpdateRule.register("stableopt.optim.lbfgs.optimizer.LBFGS", read_lbfgs)


if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name == "LBFGS":  # on demand: it is most of the package
            return importlib.import_module("stableopt.optim.lbfgs").LBFGS
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
