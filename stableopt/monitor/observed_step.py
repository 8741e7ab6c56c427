"""`observe_steps`: calls before and after each step of an optimizer, by torch's hooks or without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from stableopt._support.torch_internals import eager

__all__ = ["observe_steps"]

Hook = Callable[[Any, Any, Any], Any]


class ObservedStep:
    """The ``step`` of one optimizer that has no hooks; a copy of that optimizer has its own step.

    Attributes:
        active: whether the hooks are called. A scheduler may have wrapped this step, and keep it.
    """

    def __init__(self, optimizer: Any, before: Hook | None, after: Hook) -> None:
        self._optimizer, self._before, self._after = optimizer, before, after
        self._own = optimizer.step
        # What the instance had before, as of a scheduler that counts calls.
        self._instance = vars(optimizer).get("step")
        self.active = True
        # A scheduler reads attributes of the method, such as __func__.
        functools.update_wrapper(self, self._own, updated=())
        if isinstance(self._own, MethodType):
            self.__self__, self.__func__ = self._own.__self__, self._own.__func__
        optimizer.step = self

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the step."""
        if self.active and self._before is not None:
            replaced = self._before(self._optimizer, (self._optimizer, *args), kwargs)
            if replaced is not None:
                (_, *args), kwargs = replaced
        result = self._own(*args, **kwargs)
        if self.active:
            self._after(self._optimizer, (self._optimizer, *args), kwargs)
        return result

    def remove(self) -> None:
        """Give the optimizer its own step again."""
        self.active = False
        if vars(self._optimizer).get("step") is not self:
            return  # another wrapper lies around it, and stays
        if self._instance is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._instance

    def __reduce__(self) -> tuple[Any, ...]:
        own = self._own
        if self._instance is None and isinstance(own, MethodType):
            return getattr, (own.__self__, own.__name__)
        return _same, (own,)


def _same(value: Any) -> Any:
    return value


def observe_steps(optimizer: Any, before: Hook | None, after: Hook) -> list[Any]:
    """Call ``before`` and ``after`` around each step; return handles with ``remove()``.

    Hooks of torch are used where the optimizer has them, and else ``step`` is replaced on the instance.

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
        return [*first, optimizer.register_step_post_hook(after)]
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"optimizer={optimizer!r}: expected an optimizer with a method step")
    try:
        return [ObservedStep(optimizer, before, after)]
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
