"""`diagnosis`: the installed packages and devices, and how a model and an optimizer are measured.

python -m stableopt doctor
python -m stableopt doctor package.module:make_model
python -m stableopt doctor --optimizer schedulefree:AdamWScheduleFree
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from stableopt._version import __version__
from stableopt.curvature.isolation.plain_kernels import compiled
from stableopt.curvature.problem.cost import MOST_VECTORS, expected_products, vectors_held
from stableopt.stability import UpdateRule

__all__ = ["diagnosis", "machine", "optimizer_rule", "product_method"]

_OPTIONAL = {
    "tensorboard": "TensorBoardSink; pip install 'stableopt[tensorboard]'",
    "matplotlib": "stableopt.plot, reports, diagrams in TensorBoard; pip install 'stableopt[plot]'",
    "lightning": "its callback; pip install 'stableopt[lightning]'",
    "transformers": "its callback; pip install 'stableopt[transformers]'",
    "wandb": "WandbSink; pip install 'stableopt[wandb]'",
    "rich": "ConsoleSink; pip install 'stableopt[console]'",
}

_STEPS = 500
"""Steps before an optimizer's limit is shown: bias corrections then change it only a little."""


def machine() -> list[str]:
    """Return lines about versions, devices, and missing optional packages."""
    lines = [
        f"stableopt {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"CPU: {torch.get_num_threads()} threads",
    ]
    lines += list(_accelerators()) or ["no accelerator"]
    for name, use in _OPTIONAL.items():
        found = importlib.util.find_spec(name) is not None
        lines.append(f"{name}: {'found' if found else 'missing, needed for ' + use}")
    return lines


def _accelerators() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "mps: float32 only"


def product_method(model: nn.Module) -> list[str]:
    """Return lines on how Hessian-vector products of ``model`` would be computed, and their cost.

    The answer follows from its modules. Whether a custom backward can be differentiated again depends
    on the data: ``margins.method`` of a measurement reports it.

    >>> product_method(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))[0]
    'Hessian: double backward'
    """
    ways = ["double backward"]
    if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        ways.append("math attention")
    if compiled(model):
        ways.append("uncompiled")
    on_gpu = any(p.device.type == "cuda" for p in model.parameters())
    if on_gpu and any(isinstance(m, nn.RNNBase) for m in model.modules()):
        ways.append("without cuDNN")
    if any(isinstance(m, nn.EmbeddingBag) for m in model.modules()):
        ways = ["central differences, unless this torch has the second derivative"]
    lines = [f"Hessian: {', '.join(ways)}"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in trainable)
    lines.append(f"parameters: {size:,} trainable")
    if size:
        vectors = vectors_held(size, 4)
        products = expected_products(1e-3, restarts=vectors < MOST_VECTORS)
        mebibytes = (vectors + 4) * 4 * size / 2**20
        lines.append(
            f"sharpness to 1e-3: about {products} products, and up to {mebibytes:,.0f} MiB of vectors;"
            " Problem(...).cost() adds times and passes"
        )
    dtypes = sorted({str(p.dtype) for p in trainable})
    if any(p.dtype not in (torch.float32, torch.float64) for p in trainable):
        lines.append(f"precision: {', '.join(dtypes)}; pass dtype=torch.float32 to measure it")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        lines.append(
            "batch norm: measured in eval mode; batch_statistics=True for the batches' own"
        )
    return lines


def optimizer_rule(kind: type) -> list[str]:
    r"""Return lines on the reader of the optimizer class ``kind``, and on its limit.

    The limit is the one after 500 steps on a small problem, with the class's default settings.

    >>> print(*optimizer_rule(torch.optim.RMSprop), sep="\n")    # doctest: +NORMALIZE_WHITESPACE
    known: stableopt.stability.rules.readers.adaptive.read_rmsprop
    limit: 200 on lambda_max(PH) = 2/lr at lr=0.01
    preconditioner: diagonal
    """
    base, reader = UpdateRule.reader_of(kind)
    if reader is None:
        reason = f"overrides the step of {base.__name__}" if base else "has no reader"
        return [
            f"not known: {kind.__name__} {reason}",
            "measured without a limit: the sharpness, and margins along the step",
            f"to add a limit: UpdateRule.register({kind.__name__}, reader), or pass update_rule=",
        ]
    lines = [f"known: {reader.__module__}.{reader.__qualname__}"]
    try:
        rule = UpdateRule.from_optimizer(_stepped(kind))
    except Exception as error:  # arguments that only the user knows
        return [*lines, f"limit: not shown, since a trial run failed: {error}"]
    if rule.unknown is not None:
        return [*lines, f"limit: not known: {rule.unknown}"]
    eigenvalue = "lambda_max(PH)" if rule.preconditioned else "lambda_max(H)"
    limit, lr = rule.max_sharpness, rule.lr
    lines.append(f"limit: {limit:.4g} on {eigenvalue} = {limit * lr:.4g}/lr at lr={lr:.4g}")
    if rule.preconditioner is not None:
        lines.append(f"preconditioner: {'diagonal' if rule.diagonal else 'not diagonal'}")
    return lines


def _stepped(kind: type) -> Any:
    """Return an optimizer of ``kind`` over a small matrix, after its first steps."""
    p = nn.Parameter(torch.ones(2, 2))
    if "params" in inspect.signature(kind).parameters:
        optimizer = kind([p])
    else:
        optimizer = kind(torch.optim.SGD([p], lr=0.1))
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()

    sparse = False

    def closure() -> torch.Tensor:
        with torch.enable_grad():
            loss = p.square().sum() / 2
            # Optimizers that estimate the Hessian need the graph.
            (gradient,) = torch.autograd.grad(loss, p, create_graph=not sparse)
        p.grad = gradient.to_sparse() if sparse else gradient
        return loss

    for _ in range(_STEPS):
        try:
            closure()
            optimizer.step(closure)
        except RuntimeError:
            sparse = True  # SparseAdam requires it
            closure()
            optimizer.step(closure)
    return optimizer


def diagnosis(target: str | None = None, optimizer: str | None = None) -> str:
    """Return the report of ``python -m stableopt doctor``.

    Args:
        target: ``"module:name"`` of a model or its factory; adds how it would be measured.
        optimizer: ``"module:name"`` of an optimizer class; adds how it is read, and its limit.
    """
    lines = machine()
    if target is not None:
        lines += ["", f"{target}:", *(f"  {line}" for line in product_method(_model_named(target)))]
    if optimizer is not None:
        kind = _imported(optimizer)
        if not (isinstance(kind, type) and callable(getattr(kind, "step", None))):
            raise ValueError(f"{optimizer!r} is {kind!r}: expected a class of optimizers")
        lines += ["", f"{optimizer}:", *(f"  {line}" for line in optimizer_rule(kind))]
    return "\n".join(lines)


def _imported(target: str) -> Any:
    """Import and return the object that ``"module:name"`` names."""
    name, colon, attribute = target.partition(":")
    if not colon:
        raise ValueError(f"{target!r}: expected module:name, such as torchvision.models:resnet18")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(name), attribute)


def _model_named(target: str) -> nn.Module:
    """Return the model that ``target`` names, or that the named function or class returns.

    Raises:
        ValueError: if it is not a model.
    """
    named = _imported(target)
    model = named if isinstance(named, nn.Module) else named()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target!r} is a {type(model).__name__}: expected a torch.nn.Module")
    return model
