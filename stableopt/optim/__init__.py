"""Drop-in optimizers that can be tracked."""

from stableopt.optim.lbfgs import LBFGS
from stableopt.optim.sgd import GD, SGD
from stableopt.stability import UpdateRule
from stableopt.stability.readers.sgd import read_sgd

__all__ = ["GD", "LBFGS", "SGD"]

UpdateRule.register(GD, lambda optimizer: read_sgd(optimizer, full_batch=True))
