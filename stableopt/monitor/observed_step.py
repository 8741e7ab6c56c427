"""`observe_steps`: calls functions before and after each step of an optimizer."""

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
    """A wrapper around the ``step`` of one optimizer without hooks; copies are not observed.

    Attributes:
        active: whether the functions are called. It ends observation where a scheduler has wrapped
            this object and keeps it.
    """

    def __init__(self, optimizer: Any, before: Hook | None, after: Hook) -> None:
        self._optimizer, self._before, self._after = optimizer, before, after
        self._wrapped_step = optimizer.step
        # An earlier wrapper on the instance, such as a scheduler's call counter.
        self._former_attribute = vars(optimizer).get("step")
        self.active = True
        # Schedulers read attributes of the bound method, such as __func__.
        functools.update_wrapper(self, self._wrapped_step, updated=())
        if isinstance(self._wrapped_step, MethodType):
            self.__self__, self.__func__ = self._wrapped_step.__self__, self._wrapped_step.__func__
        optimizer.step = self

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the step, with the calls before and after it."""
        if self.active and self._before is not None:
            replaced = self._before(self._optimizer, (self._optimizer, *args), kwargs)
            if replaced is not None:
                (_, *args), kwargs = replaced
        result = self._wrapped_step(*args, **kwargs)
        if self.active:
            self._after(self._optimizer, (self._optimizer, *args), kwargs)
        return result

    def remove(self) -> None:
        """Restore the optimizer's former ``step``."""
        self.active = False
        if vars(self._optimizer).get("step") is not self:
            return  # another wrapper replaced this one, and stays
        if self._former_attribute is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._former_attribute

    def __reduce__(self) -> tuple[Any, ...]:
        step = self._wrapped_step
        if self._former_attribute is None and isinstance(step, MethodType):
            return getattr, (step.__self__, step.__name__)
        return _identity, (step,)


def _identity(value: Any) -> Any:
    return value


def observe_steps(optimizer: Any, before: Hook | None, after: Hook) -> list[Any]:
    """Call ``before`` and ``after`` around each step; return handles with ``remove()``.

    If the optimizer has torch's step hooks, these are used; else ``step`` is wrapped on the instance.

    Args:
        optimizer: any object with ``param_groups`` and ``step``.
        before: called like torch's pre-hooks, with optimizer, arguments and keyword arguments; it may
            return replaced arguments and keyword arguments.
        after: called like torch's post-hooks.

    Raises:
        TypeError: for an optimizer without ``step``, or whose ``step`` cannot be set.

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
        handles = [] if before is None else [optimizer.register_step_pre_hook(before)]
        return [*handles, optimizer.register_step_post_hook(after)]
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
    """Whether ``optimizer`` has torch's hooks; a subclass may not have called ``super().__init__``."""
    return isinstance(optimizer, torch.optim.Optimizer) and all(
        hasattr(optimizer, f"_optimizer_step_{kind}_hooks") for kind in ("pre", "post")
    )
