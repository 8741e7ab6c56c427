"""Evaluating a model during training without leaving a trace."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["measuring", "undisturbed"]

_SEED = 0
"""Any constant: random numbers drawn in a measurement must be the same in each of its products."""

_one_at_a_time = threading.RLock()

_inside: ContextVar[bool] = ContextVar("inside", default=False)


def measuring() -> bool:
    """Return whether the caller runs inside :func:`undisturbed`, by whomever it was entered.

    >>> with undisturbed(nn.Identity(), torch.device("cpu")):
    ...     measuring()
    True
    >>> measuring()
    False
    """
    return _inside.get()


@contextlib.contextmanager
def undisturbed(
    model: nn.Module, device: torch.device, generators: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """Evaluate ``model`` as a fixed, twice differentiable function; restore everything afterwards.

    Inside: eval mode (dropout off, batch norm by its running statistics: the per-sample Hessians of
    the theory do not exist where samples are coupled), gradients on, autocast off, attention by its
    math kernel (the others have no double backward), and every random generator at a fixed seed.
    Afterwards: each module's ``training`` flag and other attributes, and the state of Python's,
    NumPy's and torch's generators, on the CPU, on ``device`` and in ``generators``, are what they were.
    Several threads take turns: generators and kernel choice belong to the process.

    >>> layer = nn.Dropout()
    >>> with undisturbed(layer, torch.device("cpu")):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    with _one_at_a_time, _everything_kept(model, device, generators):
        yield


@contextlib.contextmanager
def _everything_kept(
    model: nn.Module, device: torch.device, generators: Iterable[torch.Generator]
) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    attributes = [(module, dict(module.__dict__)) for module, _ in flags]
    own = [(generator, generator.get_state()) for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [] if device.type == "cpu" else [device]
    device_type = device.type if device.type != "cpu" else "cuda"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices, device_type=device_type))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        token = _inside.set(True)
        try:
            # Set the flag itself: `train()` may be overridden, and may do more than set it.
            for module, _ in flags:
                module.training = False
            torch.default_generator.manual_seed(_SEED)
            if devices:
                getattr(torch, device.type).manual_seed(_SEED)
            random.seed(_SEED)
            np.random.seed(_SEED)  # noqa: NPY002
            for generator, _ in own:
                generator.manual_seed(_SEED)
            yield
        finally:
            _inside.reset(token)
            for module, training in flags:
                module.training = training
            for module, before in attributes:
                _restore(module.__dict__, before)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for generator, state in own:
                generator.set_state(state)


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """Put back what a forward pass assigned, as a recurrent model its hidden state."""
    for name in attributes.keys() - before.keys():
        del attributes[name]
    for name, value in before.items():
        if attributes.get(name) is not value:
            attributes[name] = value
