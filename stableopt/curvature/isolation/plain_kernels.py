"""`plain_operations`: a context that runs a model by twice differentiable operations.

Operations that make training fast often have no second derivative, or a wrong one: fused attention
kernels, compiled graphs, cuDNN's recurrent kernels, recomputed activations. In half precision, rounding
errors exceed the second derivative. Each such operation has a plain twin with the same values.
:func:`plain_operations` makes the model use the twin, also inside modules, and reports the replacements.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint  # which older releases do not import by themselves
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from stableopt.curvature.isolation.cross_entropy import lean_cross_entropy

__all__ = ["NOTES", "AttentionWatcher", "compiled", "plain_operations"]

ATTENTION = "math attention"
UNCOMPILED = "uncompiled"
CHECKPOINTING = "without checkpointing"
AUTOCAST = "without autocast"
CUDNN = "without cuDNN"

NOTES = (ATTENTION, UNCOMPILED, CHECKPOINTING, AUTOCAST, CUDNN)
"""Names of the replacements, in the order of reports."""

Note = Callable[[str], None]


def compiled(model: nn.Module) -> bool:
    """Return whether ``model`` or a part of it was compiled by ``torch.compile``.

    >>> compiled(nn.Linear(2, 1))
    False
    """
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


class AttentionWatcher(TorchFunctionMode):
    """Reports calls of fused attention, which an autograd graph does not show."""

    def __init__(self, note: Note) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Pass the call on."""
        kwargs = kwargs or {}
        # multi_head_attention_forward hides the inner call from the mode.
        if function is nn.functional.scaled_dot_product_attention or (
            function is nn.functional.multi_head_attention_forward
            and not kwargs.get("need_weights", True)
        ):
            self._note(ATTENTION)
        return function(*args, **kwargs)


@contextlib.contextmanager
def plain_operations(
    model: nn.Module,
    device: torch.device,
    *,
    note: Note,
    inside: Callable[[], bool],
    autocast: torch.dtype | None = None,
) -> Iterator[None]:
    """Run ``model`` by plain operations, and report each replaced fast operation to ``note``.

    Replaced are fused attention, compiled code, recomputed activations, autocast (unless ``autocast``
    is a dtype: models then cast as in training), and on a GPU cuDNN for models with recurrent layers.

    Args:
        model: the model.
        device: the device of the model.
        note: called with one of :data:`NOTES`.
        inside: returns whether the calling thread measures: replacements affect the whole process, and
            another thread may be training.
        autocast: the dtype for which autocast stays on.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_checkpointing_off(note, inside))
        stack.enter_context(_hard_sigmoid(inside))
        stack.enter_context(_weight_norm(inside))
        stack.enter_context(_cross_entropy(inside))
        if autocast is None:
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(_autocast_off(note, inside))
        # If the compiler is not loaded, nothing is compiled; loading it takes seconds.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            note(CUDNN)
            stack.enter_context(_replaced(torch.backends.cudnn, "enabled", False))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _hard_sigmoid(inside: Callable[[], bool]) -> Iterator[None]:
    """Compute hard sigmoids from a clamp, since torch's kernel has no second derivative.

    The values differ only by rounding, so nothing is reported. Models may have imported
    ``torch.nn.functional.hardsigmoid`` by name, so the functions that it calls are replaced.
    """
    home: Any = torch._C._nn
    with contextlib.ExitStack() as stack:
        for name in ("hardsigmoid", "hardsigmoid_"):
            original = getattr(home, name, None)
            if original is None:
                continue

            def plain(
                x: Tensor, *, name: str = name, original: Callable[[Tensor], Tensor] = original
            ) -> Tensor:
                if not inside():
                    return original(x)
                clamped = (x / 6 + 0.5).clamp(0, 1)
                return x.copy_(clamped) if name.endswith("_") else clamped

            stack.enter_context(_replaced(home, name, plain))
        yield


@contextlib.contextmanager
def _weight_norm(inside: Callable[[], bool]) -> Iterator[None]:
    """Compute weight norms from a quotient, since torch's fused kernel has a wrong second derivative.

    In torch 2.13 it is off by tens of percent. The values differ only by rounding, so nothing is
    reported.
    """
    original = torch._weight_norm

    def plain(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        if not inside():
            return original(v, g, dim)
        # dim=-1 is the norm of all entries. torch.norm_except_dim has no rule for vmap.
        others = [other for other in range(v.dim()) if other != dim]
        norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1)
        return v * (g / norm)

    # The older of torch's two modules has imported the function by name.
    older: Any = sys.modules.get("torch.nn.utils.weight_norm", torch.nn.utils.weight_norm)
    with contextlib.ExitStack() as stack:
        for home in (torch, older):
            if getattr(home, "_weight_norm", None) is original:
                stack.enter_context(_replaced(home, "_weight_norm", plain))
        yield


@contextlib.contextmanager
def _cross_entropy(inside: Callable[[], bool]) -> Iterator[None]:
    """Compute large cross-entropies by formulas, which save fewer copies of the logits.

    The values differ only by rounding, so nothing is reported.
    """
    home: Any = torch._C._nn
    original = getattr(home, "cross_entropy_loss", None)
    if original is None:
        yield
        return

    def lean(*args: Any, **kwargs: Any) -> Tensor:
        if not inside():
            loss: Tensor = original(*args, **kwargs)
            return loss
        return lean_cross_entropy(original, *args, **kwargs)

    with _replaced(home, "cross_entropy_loss", lean):
        yield


@contextlib.contextmanager
def _checkpointing_off(note: Note, inside: Callable[[], bool]) -> Iterator[None]:
    """Turn checkpointing off: a recomputation would use the model's own parameters.

    Models may have imported ``torch.utils.checkpoint.checkpoint`` by name, so the functions that it
    calls are replaced. In a release of torch without them checkpointing stays on, and the check of the
    gradient detects it.
    """
    home = torch.utils.checkpoint
    reentrant = getattr(home, "CheckpointFunction", None)
    generator = getattr(home, "_checkpoint_without_reentrant_generator", None)

    class Plain:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            if not inside():
                return reentrant.apply(function, preserve, *args)  # type: ignore[union-attr]
            note(CHECKPOINTING)
            return function(*args)

    def plain(*args: Any, **kwargs: Any) -> Iterator[None]:
        if not inside():
            yield from generator(*args, **kwargs)  # type: ignore[misc]
        else:
            note(CHECKPOINTING)
            yield

    with contextlib.ExitStack() as stack:
        if reentrant is not None:
            stack.enter_context(_replaced(home, "CheckpointFunction", Plain))
        if generator is not None:
            stack.enter_context(_replaced(home, "_checkpoint_without_reentrant_generator", plain))
        yield


@contextlib.contextmanager
def _autocast_off(note: Note, inside: Callable[[], bool]) -> Iterator[None]:
    """Ignore autocast contexts inside a model, so that it runs in its parameters' precision."""
    original = torch.set_autocast_enabled

    def disable(*args: Any) -> None:
        # torch calls it as (device, enabled), and in older releases as (enabled).
        if inside() and args[-1]:
            note(AUTOCAST)
            args = (*args[:-1], False)
        original(*args)

    with _replaced(torch, "set_autocast_enabled", disable):
        yield
