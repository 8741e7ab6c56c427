"""`observe_steps`: calls before and after each step of an optimizer, by torch's hooks or without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from stableopt._support.torch_internals import eager
from stableopt.monitor.joint_step import running_steps

__all__ = ["observe_steps"]

_PARTS = ("first_step", "second_step", "third_step")
"""Of SAM (Foret et al., 2021) and its variants: a loop computes a gradient before each of them."""

Hook = Callable[[Any, Any, Any], Any]


class ObservedMethod:
    """A method of one optimizer, with calls before and after; a copy of the optimizer has its own.

    Attributes:
        active: whether the hooks are called. A scheduler may have wrapped this method, and keep it.
    """

    def __init__(self, optimizer: Any, name: str, before: Hook | None, after: Hook | None) -> None:
        self._optimizer, self._name, self._before, self._after = optimizer, name, before, after
        self._own = getattr(optimizer, name)
        # What the instance had before, as of a scheduler that counts calls.
        self._instance = vars(optimizer).get(name)
        self.active = True
        # A scheduler reads attributes of the method, such as __func__.
        functools.update_wrapper(self, self._own, updated=())
        if isinstance(self._own, MethodType):
            self.__self__, self.__func__ = self._own.__self__, self._own.__func__
        setattr(optimizer, name, self)

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        if self.active and self._before is not None:
            replaced = self._before(self._optimizer, (self._optimizer, *args), kwargs)
            if replaced is not None:
                (_, *args), kwargs = replaced
        result = self._own(*args, **kwargs)
        if self.active and self._after is not None:
            self._after(self._optimizer, (self._optimizer, *args), kwargs)
        return result

    def remove(self) -> None:
        """Give the optimizer its own method again."""
        self.active = False
        if vars(self._optimizer).get(self._name) is not self:
            return  # another wrapper lies around it, and stays
        if self._instance is None:
            delattr(self._optimizer, self._name)
        else:
            setattr(self._optimizer, self._name, self._instance)

    def __reduce__(self) -> tuple[Any, ...]:
        own = self._own
        if self._instance is None and isinstance(own, MethodType):
            return getattr, (own.__self__, own.__name__)
        return _same, (own,)


class ObservedPart(ObservedMethod):
    """A part of a step that a training loop may call instead of ``step``, which calls it too."""

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the part; its hooks see no arguments, since those are not of a step."""
        alone = self.active and not running_steps(self._optimizer)
        if alone and self._before is not None:
            self._before(self._optimizer, (self._optimizer,), {})
        result = self._own(*args, **kwargs)
        if alone and self._after is not None:
            self._after(self._optimizer, (self._optimizer,), {})
        return result


def _same(value: Any) -> Any:
    return value


def observe_steps(optimizer: Any, before: Hook | None, after: Hook) -> list[Any]:
    """Call ``before`` and ``after`` around each step; return handles with ``remove()``.

    Hooks of torch are used where the optimizer has them, and else ``step`` is replaced on the instance.
    A step in parts, SAM's ``first_step`` and ``second_step``, is observed as one.

    Args:
        optimizer: anything with ``param_groups`` and ``step``.
        before: called with optimizer, arguments and keyword arguments, as torch's hooks are; it may
            return other arguments, as they may.
        after: the same after the step.

    Raises:
        TypeError: for an optimizer without ``step``, or that refuses an attribute.

    >>> class Wrapper:
    ...     def __init__(self, optimizer):
    ...         self.optimizer, self.param_groups = optimizer, optimizer.param_groups
    ...     def step(self):
    ...         self.optimizer.step()
    >>> wrapper = Wrapper(torch.optim.SGD([torch.zeros(1)]))
    >>> handles = observe_steps(wrapper, None, lambda *_: print("stepped"))
    >>> wrapper.step()
    stepped
    >>> for handle in handles:
    ...     handle.remove()
    >>> list(vars(wrapper))
    ['optimizer', 'param_groups']
    """
    if _has_hooks(optimizer):
        first = [] if before is None else [optimizer.register_step_pre_hook(before)]
        handles = [*first, optimizer.register_step_post_hook(after)]
        parts = [name for name in _PARTS if callable(getattr(optimizer, name, None))]
        if len(parts) > 1:
            handles.append(ObservedPart(optimizer, parts[0], before, None))
            handles.append(ObservedPart(optimizer, parts[-1], None, after))
        return handles
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"optimizer={optimizer!r}: expected an optimizer with a method step")
    try:
        return [ObservedMethod(optimizer, "step", before, after)]
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"optimizer={type(optimizer).__name__} has no step hooks, and its step cannot be observed"
            f" ({error}): pass the torch.optim.Optimizer inside"
        ) from error


def _has_hooks(optimizer: Any) -> bool:
    """Whether torch calls hooks of ``optimizer``: a subclass may not have run its initialisation."""
    return isinstance(optimizer, torch.optim.Optimizer) and all(
        hasattr(optimizer, f"_optimizer_step_{kind}_hooks") for kind in ("pre", "post")
    )
