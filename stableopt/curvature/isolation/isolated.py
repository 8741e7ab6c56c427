"""`isolated`: a context that evaluates a model during training without side effects."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stableopt.curvature.isolation.plain_kernels import plain_operations
from stableopt.curvature.isolation.snapshot import Snapshot

__all__ = ["isolated", "measuring"]

_SEED = 0
"""Any constant: every product of a measurement must draw the same random numbers."""

_lock = threading.RLock()

_inside: ContextVar[bool] = ContextVar("inside", default=False)


def measuring() -> bool:
    """Return whether the caller runs inside :func:`isolated`.

    >>> with isolated(nn.Identity(), torch.device("cpu")):
    ...     measuring()
    True
    >>> measuring()
    False
    """
    return _inside.get()


@contextlib.contextmanager
def isolated(
    model: nn.Module,
    device: torch.device,
    *,
    note: Callable[[str], None] = lambda _: None,
    autocast: torch.dtype | None = None,
    batch_statistics: bool = False,
) -> Iterator[Callable[[], None]]:
    """Evaluate ``model`` as a fixed, twice differentiable function; restore everything afterwards.

    Inside, modules are in eval mode (without dropout, and with batch norm's running statistics, since
    coupled samples have no Hessians of their own), gradients are enabled, every random generator starts
    from a fixed seed, and plain operations replace fast ones without a second derivative
    (:func:`~stableopt.curvature.isolation.plain_kernels.plain_operations`). Afterwards the modules'
    attributes are restored, with their lists, dictionaries and plain tensors, and so are the states of
    the generators of Python, NumPy and torch, on the CPU, on ``device`` and in the modules. Only one
    thread at a time is inside, since generators and kernel choice belong to the process.

    Yields a function that resets state and generators to the beginning, faster than a new context.

    Args:
        model: the model, with its loss if that is a module.
        device: the device of the model.
        note: called with the name of each replaced fast operation.
        autocast: the dtype for which autocast stays on.
        batch_statistics: whether batch norm is in training mode.

    >>> layer = nn.Dropout()
    >>> with isolated(layer, torch.device("cpu")):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    with (
        _lock,
        _state_restored(model, device, batch_statistics) as reset,
        plain_operations(model, device, note=note, inside=measuring, autocast=autocast),
    ):
        yield reset


@contextlib.contextmanager
def _state_restored(
    model: nn.Module,
    device: torch.device,
    batch_statistics: bool,
) -> Iterator[Callable[[], None]]:
    modules = list(model.modules())
    flags = [(module, module.training) for module in modules]
    snapshot = Snapshot((module.__dict__ for module in modules), swapped=model.buffers())
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [] if device.type == "cpu" else [device]
    device_type = device.type if device.type != "cpu" else "cuda"

    def begin() -> None:
        # Set the flag itself, since an overridden `train()` may do more.
        for module in modules:
            module.training = batch_statistics and isinstance(module, _BatchNorm)
        torch.default_generator.manual_seed(_SEED)
        if devices:
            getattr(torch, device.type).manual_seed(_SEED)
        random.seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002

    def reset() -> None:
        snapshot.restore()
        begin()

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices, device_type=device_type))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        token = _inside.set(True)
        try:
            begin()
            yield reset
        finally:
            _inside.reset(token)
            for module, training in flags:
                module.training = training
            snapshot.restore()
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
