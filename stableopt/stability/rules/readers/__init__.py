"""Readers of optimizers' update rules: one module a family, registered on import.

A reader takes an optimizer and returns its :class:`~stableopt.stability.UpdateRule`, with the
preconditioner of its last step. Classes of optional packages are registered by name.
"""

from __future__ import annotations

import torch

from stableopt.stability.rules.readers import (
    adaptive,
    lbfgs,
    normalised,
    sgd,
    shampoo,
    torch_optimizer,
)
from stableopt.stability.rules.update_rule import UpdateRule

__all__: list[str] = []

UpdateRule.register(torch.optim.SGD, sgd.read_sgd)
UpdateRule.register(torch.optim.Adam, adaptive.read_adam)
UpdateRule.register(torch.optim.AdamW, adaptive.read_adam)
UpdateRule.register(torch.optim.NAdam, adaptive.read_nadam)
UpdateRule.register(torch.optim.RMSprop, adaptive.read_rmsprop)
UpdateRule.register(torch.optim.Adagrad, adaptive.read_adagrad)
UpdateRule.register(torch.optim.LBFGS, lbfgs.read_lbfgs)
UpdateRule.register(torch.optim.Rprop, normalised.read_rprop)
UpdateRule.register("torch.optim._muon.Muon", normalised.read_muon)
UpdateRule.register("torch_optimizer.adabelief.AdaBelief", torch_optimizer.read_adabelief)
UpdateRule.register("torch_optimizer.adahessian.Adahessian", torch_optimizer.read_adahessian)
UpdateRule.register("torch_optimizer.apollo.Apollo", torch_optimizer.read_apollo)
UpdateRule.register("torch_optimizer.shampoo.Shampoo", shampoo.read_shampoo)
UpdateRule.register("torch_optimizer.yogi.Yogi", torch_optimizer.read_yogi)
