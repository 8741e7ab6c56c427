"""`LBFGS`, with the results and checkpoints of ``torch.optim.LBFGS``, and stability margins."""

from stableopt.optim.lbfgs.optimizer import LBFGS

__all__ = ["LBFGS"]
