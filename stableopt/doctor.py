"""`diagnosis`: what stableopt finds on this machine, and how it would measure a given model.

python -m stableopt doctor
python -m stableopt doctor package.module:make_model
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from stableopt._version import __version__
from stableopt.curvature.isolation.plain_kernels import compiled

__all__ = ["diagnosis", "machine", "product_method"]

_OPTIONAL = {
    "tensorboard": "TensorBoardSink; pip install 'stableopt[tensorboard]'",
    "matplotlib": "stableopt.plot, and the diagrams in TensorBoard; pip install 'stableopt[plot]'",
    "lightning": "its callback; pip install 'stableopt[lightning]'",
    "transformers": "its callback; pip install 'stableopt[transformers]'",
    "wandb": "WandbSink; pip install 'stableopt[wandb]'",
    "rich": "ConsoleSink; pip install 'stableopt[console]'",
}


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
    """Return lines on how products with the curvature of ``model`` would be computed.

    They follow from its modules. Whether a custom backward can be differentiated again depends on
    data: a measurement reports it as ``margins.method``.

    >>> product_method(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))[0]
    'Hessian: double backward'
    """
    kinds = {type(module).__name__ for module in model.modules()}
    ways = ["double backward"]
    if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        ways.append("math attention")
    if compiled(model):
        ways.append("uncompiled")
    on_gpu = any(p.device.type == "cuda" for p in model.parameters())
    if on_gpu and any(isinstance(m, nn.RNNBase) for m in model.modules()):
        ways.append("without cuDNN")
    if "_WeightNorm" in kinds or any(isinstance(m, nn.EmbeddingBag) for m in model.modules()):
        ways = ["central differences, unless this torch has the second derivative"]
    lines = [f"Hessian: {', '.join(ways)}"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    lines.append(f"parameters: {sum(p.numel() for p in trainable):,} trainable")
    dtypes = sorted({str(p.dtype) for p in trainable})
    if any(p.dtype not in (torch.float32, torch.float64) for p in trainable):
        lines.append(f"precision: {', '.join(dtypes)}; pass dtype=torch.float32 to measure it")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        lines.append(
            "batch norm: measured in eval mode; batch_statistics=True for the batches' own"
        )
    return lines


def diagnosis(target: str | None = None) -> str:
    """Return all lines, with those of ``target``, the ``"module:name"`` of a model or its factory."""
    lines = machine()
    if target is not None:
        lines += ["", f"{target}:", *(f"  {line}" for line in product_method(_found(target)))]
    return "\n".join(lines)


def _found(target: str) -> nn.Module:
    """Return the model that ``target`` names; a function or class is called.

    Raises:
        ValueError: if it is not a model.
    """
    name, colon, attribute = target.partition(":")
    if not colon:
        raise ValueError(f"{target!r}: expected module:name, such as torchvision.models:resnet18")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    value: Any = getattr(importlib.import_module(name), attribute)
    model = value if isinstance(value, nn.Module) else value()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target!r} is a {type(model).__name__}: expected a torch.nn.Module")
    return model
