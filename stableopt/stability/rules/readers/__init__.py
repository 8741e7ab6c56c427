"""Readers of optimizers' update rules: one module per family of optimizers, registered on import.

A reader takes an optimizer and returns its :class:`~stableopt.stability.UpdateRule`, with the
preconditioner of the last step. Classes of optional packages are registered by name.
"""

from __future__ import annotations

import torch

from stableopt.stability.rules.readers import (
    adafactor,
    adaptive,
    lbfgs,
    normalised,
    pytorch_optimizer,
    schedule_free,
    sgd,
    shampoo,
    torch_optimizer,
)
from stableopt.stability.rules.several import optimizers_in, rule_of
from stableopt.stability.rules.update_rule import REGISTRY, Reader, UpdateRule

__all__ = ["READERS"]

READERS: dict[type | str, Reader] = {
    torch.optim.SGD: sgd.read_sgd,
    torch.optim.ASGD: sgd.read_asgd,
    torch.optim.Adam: adaptive.read_adam,
    torch.optim.AdamW: adaptive.read_adam,
    torch.optim.SparseAdam: adaptive.read_sparse_adam,
    torch.optim.NAdam: adaptive.read_nadam,
    torch.optim.RAdam: adaptive.read_radam,
    torch.optim.Adamax: adaptive.read_adamax,
    torch.optim.RMSprop: adaptive.read_rmsprop,
    torch.optim.Adagrad: adaptive.read_adagrad,
    torch.optim.Adadelta: adaptive.read_adadelta,
    torch.optim.Adafactor: adafactor.read_adafactor,
    torch.optim.LBFGS: lbfgs.read_lbfgs,
    torch.optim.Rprop: normalised.read_rprop,
    "torch.optim.Muon": normalised.read_muon,  # not in every version of torch
    "torch.optim._muon.Muon": normalised.read_muon,
    "transformers.optimization.Adafactor": adafactor.read_transformers_adafactor,
    "torchao.optim.adam._AdamBase": adaptive.read_adam,
    "bitsandbytes.optim.optimizer.Optimizer2State": adaptive.read_bitsandbytes,
    "schedulefree.sgd_schedulefree.SGDScheduleFree": schedule_free.read_sgd,
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": schedule_free.read_adamw,
    "schedulefree.radam_schedulefree.RAdamScheduleFree": schedule_free.read_radam,
    "schedulefree.wrap_schedulefree.ScheduleFreeWrapper": schedule_free.read_wrapper,
    "prodigyopt.prodigy.Prodigy": pytorch_optimizer.read_prodigy,
    "pytorch_optimizer.optimizer.prodigy.Prodigy": pytorch_optimizer.read_prodigy,
    "pytorch_optimizer.optimizer.adan.Adan": pytorch_optimizer.read_adan,
    "pytorch_optimizer.optimizer.ademamix.AdEMAMix": pytorch_optimizer.read_ademamix,
    "pytorch_optimizer.optimizer.sophia.SophiaH": pytorch_optimizer.read_sophia,
    "pytorch_optimizer.optimizer.soap.SOAP": shampoo.read_soap,
    "pytorch_optimizer.optimizer.lion.Lion": normalised.read_lion,
    "lion_pytorch.lion_pytorch.Lion": normalised.read_lion,
    "bitsandbytes.optim.lion.Lion": normalised.read_lion,
    "pytorch_optimizer.optimizer.lookahead.Lookahead": sgd.read_lookahead,
    "pytorch_optimizer.optimizer.sam.SAM": sgd.read_sam,
    "torch_optimizer.accsgd.AccSGD": torch_optimizer.read_accsgd,
    "torch_optimizer.adabelief.AdaBelief": torch_optimizer.read_adabelief,
    "torch_optimizer.adabound.AdaBound": torch_optimizer.read_adabound,
    "torch_optimizer.adahessian.Adahessian": torch_optimizer.read_adahessian,
    "torch_optimizer.adamod.AdaMod": torch_optimizer.read_adamod,
    "torch_optimizer.apollo.Apollo": torch_optimizer.read_apollo,
    "torch_optimizer.lookahead.Lookahead": sgd.read_lookahead,
    "torch_optimizer.pid.PID": torch_optimizer.read_pid,
    "torch_optimizer.qhadam.QHAdam": torch_optimizer.read_qhadam,
    "torch_optimizer.qhm.QHM": torch_optimizer.read_qhm,
    "torch_optimizer.shampoo.Shampoo": shampoo.read_shampoo,
    "torch_optimizer.yogi.Yogi": torch_optimizer.read_yogi,
}
"""The reader of each known class; a string stands for a class of an optional package."""

for _kind, _reader in READERS.items():
    UpdateRule.register(_kind, _reader)
REGISTRY.joint = lambda optimizers: rule_of(optimizers_in(optimizers))
