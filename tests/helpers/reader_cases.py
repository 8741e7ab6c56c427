"""Cases of `Frozen` for every optimizer with a limit, of torch and of optional packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch_optimizer
from frozen_optimizer import Case, of

import stableopt

optim = torch.optim
ONE_ITERATION = {"max_iter": 1, "tolerance_grad": 0, "tolerance_change": 0}


def sgd(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: torch.optim.SGD(groups, **{"lr": 0.1, **options})


def packaged(name: str, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """Make the class that ``package:Class`` names; schedule-free ones in training mode."""

    def make(groups: Any) -> torch.optim.Optimizer:
        module, kind = name.split(":")
        optimizer = getattr(importlib.import_module(module), kind)(groups, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def wrapped(**options: Any) -> Callable[[Any], Any]:
    """Make SGD in ScheduleFreeWrapper, both with momentum."""

    def make(groups: Any) -> Any:
        free = importlib.import_module("schedulefree")
        optimizer = free.ScheduleFreeWrapper(torch.optim.SGD(groups, **options), momentum=0.95)
        optimizer.train()
        return optimizer

    return make


CASES = {
    "SGD, rates": Case(sgd(), bias={"lr": 0.03}),
    "SGD, rates and decays": Case(
        sgd(momentum=0.9, nesterov=True), "momentum_buffer", {"weight_decay": 0.2}, {"lr": 0.2}
    ),
    "SGD, decays": Case(sgd(momentum=0.5), "momentum_buffer", {"weight_decay": 0.3}),
    "Adam": Case(of(optim.Adam, lr=0.01), "exp_avg"),
    "Adam, loop, no average": Case(of(optim.Adam, lr=0.01, betas=(0.0, 0.99), foreach=False)),
    "Adam, amsgrad, L2": Case(
        of(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.3, foreach=True), "exp_avg"
    ),
    "Adam, fused, rates, L2, eps": Case(
        of(optim.Adam, lr=0.01, fused=True),
        "exp_avg",
        {"weight_decay": 0.5, "eps": 0.1},
        {"lr": 0.002, "betas": (0.9, 0.9)},
    ),
    "Adam, maximize, L2": Case(
        of(optim.Adam, lr=0.01, maximize=True, weight_decay=0.1), "exp_avg", sign=-1.0
    ),
    "AdamW": Case(of(optim.AdamW, lr=0.01, weight_decay=20.0), "exp_avg"),
    "AdamW, tensor lr": Case(
        of(optim.AdamW, lr=torch.tensor(0.01).double(), foreach=False), "exp_avg"
    ),
    "AdamW, bias does not decay": Case(
        of(optim.AdamW, lr=0.01, weight_decay=30.0),
        "exp_avg",
        bias={"weight_decay": 0.0, "lr": 0.02},
        scalar=False,
    ),
    "NAdam": Case(of(optim.NAdam, lr=0.01), "exp_avg"),
    "NAdam, mu at a half": Case(of(optim.NAdam, lr=0.01, momentum_decay=0.0), "exp_avg"),
    "NAdam, fast schedule, L2": Case(
        of(optim.NAdam, lr=0.01, momentum_decay=0.5, weight_decay=0.4, foreach=True), "exp_avg"
    ),
    "NAdam, decoupled": Case(
        of(optim.NAdam, lr=0.01, weight_decay=20.0, decoupled_weight_decay=True), "exp_avg"
    ),
    "RMSprop": Case(of(optim.RMSprop, lr=0.01)),
    "RMSprop, momentum, L2": Case(
        of(optim.RMSprop, lr=0.01, momentum=0.8, weight_decay=0.3), "momentum_buffer"
    ),
    "RMSprop, centered": Case(
        of(optim.RMSprop, lr=0.01, momentum=0.9, centered=True, alpha=0.9), "momentum_buffer"
    ),
    "Adagrad": Case(of(optim.Adagrad, lr=0.1, eps=0.1)),
    "Adagrad, decay of both kinds": Case(
        of(optim.Adagrad, lr=0.1, lr_decay=0.2, weight_decay=0.3, initial_accumulator_value=0.5),
        bias={"weight_decay": 0.1},
    ),
    "LBFGS": Case(
        lambda groups: optim.LBFGS([p for g in groups for p in g["params"]], 0.5, **ONE_ITERATION)
    ),
    "LBFGS of this package, two-loop, rates, L2": Case(
        of(stableopt.LBFGS, lr=0.5, direction="two_loop", weight_decay=0.1, **ONE_ITERATION),
        bias={"lr": 0.3},
    ),
    "Yogi": Case(of(torch_optimizer.Yogi, lr=0.01, weight_decay=0.2), "exp_avg"),
    "AdaBelief": Case(of(torch_optimizer.AdaBelief, lr=0.01, eps=1e-3), "exp_avg"),
    "AdaBelief, amsgrad, L2": Case(
        of(torch_optimizer.AdaBelief, lr=0.01, eps=1e-3, amsgrad=True, weight_decay=0.2), "exp_avg"
    ),
    "AdaBelief, decoupled": Case(
        of(torch_optimizer.AdaBelief, lr=0.01, weight_decouple=True, weight_decay=9.0), "exp_avg"
    ),
    "AdaBelief, fixed decay": Case(
        of(
            torch_optimizer.AdaBelief,
            lr=0.01,
            weight_decouple=True,
            fixed_decay=True,
            weight_decay=0.1,
        ),
        "exp_avg",
    ),
    "Adahessian": Case(
        of(torch_optimizer.Adahessian, lr=0.1, hessian_power=1.0), "exp_avg", second_order=True
    ),
    "Adahessian, power, decay": Case(
        of(torch_optimizer.Adahessian, lr=0.1, hessian_power=0.5, weight_decay=1.5),
        "exp_avg",
        second_order=True,
    ),
    "Apollo": Case(of(torch_optimizer.Apollo, lr=0.5, weight_decay=0.1), "exp_avg_grad"),
    "Shampoo": Case(of(torch_optimizer.Shampoo, lr=0.1, epsilon=1.0, weight_decay=0.2)),
    "Shampoo, update_freq": Case(of(torch_optimizer.Shampoo, lr=0.1, epsilon=2.0, update_freq=3)),
    "Shampoo, momentum, rates": Case(
        of(torch_optimizer.Shampoo, lr=0.1, epsilon=3.0, momentum=0.8, weight_decay=0.1),
        "momentum_buffer",
        bias={"lr": 0.05, "momentum": 0.4},
        scalar=False,
    ),
    "AdaBound": Case(
        of(torch_optimizer.AdaBound, lr=0.01, final_lr=0.05, gamma=0.1, weight_decay=0.2),
        "exp_avg",
    ),
    "AdaBound, amsbound": Case(of(torch_optimizer.AdaBound, lr=0.01, amsbound=True), "exp_avg"),
    "AdaMod": Case(of(torch_optimizer.AdaMod, lr=0.01, beta3=0.5, weight_decay=2.0), "exp_avg"),
    "QHM": Case(
        of(torch_optimizer.QHM, lr=0.1, momentum=0.9, nu=0.7, weight_decay=0.3), "momentum_buffer"
    ),
    "QHM, direct decay": Case(
        of(
            torch_optimizer.QHM,
            lr=0.1,
            momentum=0.5,
            nu=0.9,
            weight_decay=0.3,
            weight_decay_type="direct",
        ),
        "momentum_buffer",
    ),
    "QHAdam": Case(
        of(torch_optimizer.QHAdam, lr=0.01, nus=(0.7, 1.0), weight_decay=0.2), "exp_avg"
    ),
    "QHAdam, shares of both, decoupled": Case(
        of(
            torch_optimizer.QHAdam,
            lr=0.01,
            nus=(0.8, 0.6),
            betas=(0.8, 0.99),
            weight_decay=3.0,
            decouple_weight_decay=True,
        ),
        "exp_avg",
    ),
    "PID": Case(
        of(torch_optimizer.PID, lr=0.01, momentum=0.8, integral=2.0, derivative=3.0, dampening=0.1),
        ("i_buffer", "d_buffer", "grad_buffer"),
        scalar=False,  # the difference of two buffers with the same memory
    ),
    "AccSGD": Case(of(torch_optimizer.AccSGD, lr=0.01, kappa=20.0, xi=3.0), "momentum_buffer"),
    "ASGD": Case(of(optim.ASGD, lr=0.1, lambd=1e-3, alpha=0.75, weight_decay=0.2), kept="eta"),
    "ASGD, loop, rates": Case(
        of(optim.ASGD, lr=0.1, foreach=False), bias={"lr": 0.03}, kept="eta", scalar=False
    ),
    "RAdam": Case(of(optim.RAdam, lr=0.01, eps=1e-2), "exp_avg"),
    "RAdam, short, decoupled": Case(
        of(
            optim.RAdam,
            lr=0.01,
            betas=(0.8, 0.9),
            weight_decay=9.0,
            decoupled_weight_decay=True,
            foreach=False,
        ),
        "exp_avg",
    ),
    "Adamax": Case(of(optim.Adamax, lr=0.01, weight_decay=0.3), "exp_avg"),
    "Adadelta": Case(of(optim.Adadelta, lr=0.5, eps=1e-3, weight_decay=0.1)),
    "Adafactor": Case(of(optim.Adafactor, lr=0.01, eps=(None, 20.0), weight_decay=2.0)),
    "Adafactor, loop, bias does not decay": Case(
        of(optim.Adafactor, lr=0.01, eps=(1e-8, 20.0), foreach=False, weight_decay=3.0),
        bias={"weight_decay": 0.0},
        scalar=False,
    ),
    "SparseAdam": Case(of(optim.SparseAdam, lr=0.01), "exp_avg", sparse=True),
    "AdamW, amsgrad": Case(of(optim.AdamW, lr=0.01, amsgrad=True, weight_decay=5.0), "exp_avg"),
}

PACKAGED = {
    "transformers.Adafactor": Case(
        packaged(
            "transformers:Adafactor",
            lr=0.1,
            scale_parameter=False,
            relative_step=False,
            weight_decay=0.5,
        )
    ),
    "transformers.Adafactor, beta1, scaled": Case(
        packaged(
            "transformers:Adafactor",
            lr=0.1,
            eps=(1e-30, 0.5),
            beta1=0.9,
            relative_step=False,
            weight_decay=0.5,
        ),
        "exp_avg",
        bias={"eps": (1e-30, 0.2)},
        scalar=False,
    ),
    "schedulefree.SGDScheduleFree": Case(packaged("schedulefree:SGDScheduleFree", lr=0.1), "z"),
    "schedulefree.SGDScheduleFree, warm-up, L2, r": Case(
        packaged(
            "schedulefree:SGDScheduleFree",
            lr=0.1,
            momentum=0.7,
            weight_decay=0.3,
            warmup_steps=20,
            r=1.0,
            foreach=False,
        ),
        "z",
    ),
    "schedulefree.AdamWScheduleFree": Case(
        packaged("schedulefree:AdamWScheduleFree", lr=0.01, weight_decay=0.4), "z"
    ),
    "schedulefree.AdamWScheduleFree, loop": Case(
        packaged(
            "schedulefree:AdamWScheduleFree",
            lr=0.01,
            betas=(0.95, 0.99),
            eps=0.1,
            warmup_steps=50,
            foreach=False,
        ),
        "z",
    ),
    "schedulefree.AdamWScheduleFree, decays": Case(
        packaged("schedulefree:AdamWScheduleFree", lr=0.01), "z", {"weight_decay": 0.4}
    ),
    "schedulefree.AdamWScheduleFree, rates and decays": Case(
        packaged("schedulefree:AdamWScheduleFree", lr=0.01, weight_decay=0.4),
        "z",
        {"weight_decay": 2.0},
        {"lr": 0.003},
    ),
    "schedulefree.RAdamScheduleFree": Case(
        packaged(
            "schedulefree:RAdamScheduleFree", lr=0.01, betas=(0.9, 0.99), silent_sgd_phase=False
        ),
        "z",
    ),
    "schedulefree.RAdamScheduleFree, silent": Case(
        packaged("schedulefree:RAdamScheduleFree", lr=0.01, betas=(0.9, 0.8), weight_decay=0.2),
        "z",
        least=6,
    ),
    "schedulefree.ScheduleFreeWrapper": Case(wrapped(lr=0.1), "z"),
    "schedulefree.ScheduleFreeWrapper, inner momentum": Case(
        wrapped(lr=0.1, momentum=0.9), ("z", "momentum_buffer")
    ),
    "schedulefree.ScheduleFreeWrapper, inner Nesterov, rates": Case(
        wrapped(lr=0.1, momentum=0.5, nesterov=True),
        ("z", "momentum_buffer"),
        bias={"lr": 0.1, "weight_lr_power": 0.0},
    ),
    "pytorch_optimizer.SOAP": Case(
        packaged("pytorch_optimizer:SOAP", lr=0.01, betas=(0.9, 0.95), weight_decay=1e-3), "exp_avg"
    ),
    "pytorch_optimizer.SOAP, biases too": Case(
        packaged(
            "pytorch_optimizer:SOAP",
            lr=0.01,
            betas=(0.9, 0.95),
            precondition_1d=True,
            correct_bias=False,
            max_precondition_dim=2,
            weight_decay=1e-3,
        ),
        "exp_avg",
        bias={"lr": 0.02, "weight_decay": 0.0},
        scalar=False,
    ),
    "pytorch_optimizer.Prodigy": Case(
        packaged("pytorch_optimizer:Prodigy", d0=0.1, growth_rate=1.0, weight_decay=0.3), "exp_avg"
    ),
    "pytorch_optimizer.Prodigy, corrected, L2": Case(
        packaged(
            "pytorch_optimizer:Prodigy",
            d0=0.1,
            growth_rate=1.0,
            weight_decay=0.3,
            weight_decouple=False,
            bias_correction=True,
            foreach=True,
        ),
        "exp_avg",
    ),
    "prodigyopt.Prodigy": Case(
        packaged(
            "prodigyopt:Prodigy",
            d0=0.1,
            growth_rate=1.0,
            use_bias_correction=True,
            weight_decay=0.3,
        ),
        "exp_avg",
    ),
    "pytorch_optimizer.Adan": Case(
        packaged("pytorch_optimizer:Adan", lr=0.01), ("exp_avg", "exp_avg_diff", "previous_grad")
    ),
    "pytorch_optimizer.Adan, proximal decay": Case(
        packaged("pytorch_optimizer:Adan", lr=0.01, weight_decay=0.02, betas=(0.9, 0.8, 0.99)),
        ("exp_avg", "exp_avg_diff", "previous_grad"),
    ),
    "pytorch_optimizer.Adan, decoupled": Case(
        packaged(
            "pytorch_optimizer:Adan", lr=0.01, weight_decay=5.0, weight_decouple=True, foreach=False
        ),
        ("exp_avg", "exp_avg_diff", "previous_grad"),
    ),
    "pytorch_optimizer.AdEMAMix": Case(
        packaged("pytorch_optimizer:AdEMAMix", lr=0.01, weight_decay=0.2),
        ("exp_avg", "exp_avg_slow"),
    ),
    "pytorch_optimizer.AdEMAMix, warm-up, decoupled": Case(
        packaged(
            "pytorch_optimizer:AdEMAMix",
            lr=0.01,
            betas=(0.9, 0.999, 0.99),
            t_alpha_beta3=40,
            weight_decay=5.0,
            weight_decouple=True,
        ),
        ("exp_avg", "exp_avg_slow"),
    ),
    "pytorch_optimizer.SophiaH": Case(
        packaged(
            "pytorch_optimizer:SophiaH",
            lr=0.05,
            update_period=1,
            num_samples=8,
            hessian_distribution="rademacher",
            weight_decay=1.0,
        ),
        "momentum",
        second_order=True,
    ),
}
"""Those of optional packages, by ``package.Class``."""


def installed(name: str) -> bool:
    """Return whether the package of a case can be imported."""
    try:
        importlib.import_module(name.split(".")[0])
    except ImportError:
        return False
    return True
