"""`observe_steps`: calls functions before and after each step of one optimizer or several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch

from stableopt._support.arguments import shown
from stableopt._support.torch_internals import eager
from stableopt.monitor.joint_step import JointStep, nested, running_steps

__all__ = ["observe_steps"]

_STEP_PARTS = ("first_step", "second_step", "third_step")
"""Parts of a step of SAM (Foret et al., 2021) and its variants; each takes a new gradient."""

Hook = Callable[[Any, Any, Any], Any]


class ObservedMethod:
    """A wrapper around a method of one optimizer; copies of the optimizer are not observed.

    Attributes:
        active: whether the functions are called; false ends observation also if a scheduler has
            wrapped this object and keeps it.
    """

    def __init__(self, optimizer: Any, name: str, before: Hook | None, after: Hook | None) -> None:
        self._optimizer, self._name, self._before, self._after = optimizer, name, before, after
        self._method = getattr(optimizer, name)
        # An earlier wrapper on the instance, such as a scheduler's call counter.
        self._former_attribute = vars(optimizer).get(name)
        self.active = True
        functools.update_wrapper(self, self._method, updated=())
        if isinstance(self._method, MethodType):
            # Schedulers wrap the function of a bound method, so it leads back here.
            self.__self__, self.__func__ = self._method.__self__, self._as_function()
        setattr(optimizer, name, self)

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, with the calls before and after it."""
        if self.active and self._before is not None:
            replaced = self._before(self._optimizer, (self._optimizer, *args), kwargs)
            if replaced is not None:
                (_, *args), kwargs = replaced
        result = self._method(*args, **kwargs)
        if self.active and self._after is not None:
            self._after(self._optimizer, (self._optimizer, *args), kwargs)
        return result

    def _as_function(self) -> Callable[..., Any]:
        @functools.wraps(self._method)
        def method(_: Any, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return method

    def remove(self) -> None:
        """Restore the optimizer's former method."""
        self.active = False
        self._before = self._after = None  # a scheduler that has wrapped this object keeps it
        if vars(self._optimizer).get(self._name) is not self:
            return  # another wrapper replaced this one, and stays
        if self._former_attribute is None:
            delattr(self._optimizer, self._name)
        else:
            setattr(self._optimizer, self._name, self._former_attribute)

    def __reduce__(self) -> tuple[Any, ...]:
        method = self._method
        if self._former_attribute is None and isinstance(method, MethodType):
            return getattr, (method.__self__, method.__name__)
        return _identity, (method,)


class ObservedStepPart(ObservedMethod):
    """A wrapper around a part of a step, which the training loop calls, or ``step`` itself.

    ``before`` and ``after`` are called outside ``step`` only, ``at_part`` always, after ``before``.
    """

    def __init__(
        self,
        optimizer: Any,
        name: str,
        before: Hook | None,
        after: Hook | None,
        at_part: Callable[[Any], object] | None = None,
    ) -> None:
        super().__init__(optimizer, name, before, after)
        self._at_part = at_part

    def remove(self) -> None:
        """Restore the optimizer's former method."""
        super().remove()
        self._at_part = None

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the part, with the calls before and after it, which do not receive its arguments."""
        alone = self.active and not running_steps(self._optimizer)
        if alone and self._before is not None:
            self._before(self._optimizer, (self._optimizer,), {})
        if self.active and self._at_part is not None:
            self._at_part(self._optimizer)
        result = self._method(*args, **kwargs)
        if alone and self._after is not None:
            self._after(self._optimizer, (self._optimizer,), {})
        return result


class NextStep(ObservedMethod):
    """A wrapper around ``step`` that calls ``actions`` before the next step, and then goes.

    torch iterates over the hooks of an optimizer while they run, and raises if they have changed. A
    call of ``step`` that has not begun is the first moment at which they may.
    """

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, "step", self._act, None)
        self.actions: list[Callable[[], object]] = []

    def __getattr__(self, name: str) -> Any:
        # Schedulers mark a step that they have wrapped, and warn if the mark is lost.
        if name == "_method":
            raise AttributeError(name)
        return getattr(self._method, name)

    def _act(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.remove()
        for action in self.actions:
            action()


def between_steps(optimizer: Any, action: Callable[[], object]) -> None:
    """Call ``action`` now, or before the next step if a step of ``optimizer`` is running."""
    if not running_steps(optimizer):
        action()
        return
    step = vars(optimizer).get("step")
    next_step = step if isinstance(step, NextStep) else NextStep(optimizer)
    next_step.actions.append(action)


class StepHook:
    """One of torch's hooks of a step, which may be made and removed by a hook of the same optimizer.

    Args:
        optimizer: the optimizer.
        register: its method that registers the hook.
        function: called like the hook until :meth:`remove`.
    """

    def __init__(self, optimizer: Any, register: Callable[[Hook], Any], function: Hook) -> None:
        self._optimizer = optimizer
        self._function: Hook | None = function
        self._handle: Any = None
        between_steps(optimizer, lambda: self._register(register))

    @eager
    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Call the function, unless the hook was removed."""
        return None if self._function is None else self._function(optimizer, args, kwargs)

    def _register(self, register: Callable[[Hook], Any]) -> None:
        if self._function is not None:
            self._handle = register(self)

    def remove(self) -> None:
        """End the calls at once; the optimizer's hooks change between two steps."""
        self._function = None
        between_steps(self._optimizer, self._unregister)

    def _unregister(self) -> None:
        if self._handle is not None:
            self._handle.remove()


def _identity(value: Any) -> Any:
    return value


def observe_steps(
    optimizers: Sequence[Any],
    before: Hook | None,
    after: Hook,
    at_first_part: Callable[[Any], object] | None = None,
) -> list[Any]:
    """Call ``before`` and ``after`` around each step; return handles with ``remove()``.

    A step of several optimizers is a :class:`JointStep`. A ``step`` that calls that of its parent class
    is one step, and so is a step in parts, such as SAM's ``first_step`` and ``second_step``. If an
    optimizer has torch's step hooks, these are used; else ``step`` is wrapped on the instance. A hook or
    a sink may call this, and ``remove()``: what it changes takes effect after the step.

    Args:
        optimizers: any objects with ``param_groups`` and ``step``.
        before: called like torch's pre-hooks, with optimizer, arguments and keyword arguments; it may
            return replaced arguments and keyword arguments.
        after: called like torch's post-hooks.
        at_first_part: called with the optimizer at the first part of a step in parts, in ``step`` too:
            the gradients are still those at the parameters before the step.

    Raises:
        TypeError: for an optimizer without ``step``, or whose ``step`` cannot be set.

    >>> class Wrapper:
    ...     def __init__(self, optimizer):
    ...         self.optimizer, self.param_groups = optimizer, optimizer.param_groups
    ...     def step(self):
    ...         self.optimizer.step()
    >>> wrapper = Wrapper(torch.optim.SGD([torch.zeros(1)]))
    >>> handles = observe_steps([wrapper], None, lambda *_: print("stepped"))
    >>> wrapper.step()
    stepped
    >>> for handle in handles:
    ...     handle.remove()
    >>> list(vars(wrapper))
    ['optimizer', 'param_groups']
    """
    joint = JointStep(optimizers)

    @eager
    def first(optimizer: Any, args: Any, kwargs: Any) -> Any:
        if nested(optimizer) or not joint.begins(optimizer) or before is None:
            return None
        return before(optimizer, args, kwargs)

    @eager
    def last(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not nested(optimizer) and joint.ends(optimizer):
            after(optimizer, args, kwargs)

    needs_first = before is not None or len(optimizers) > 1
    handles: list[Any] = []
    try:
        for optimizer in optimizers:
            handles += _observed(optimizer, first if needs_first else None, last, at_first_part)
    except Exception:
        for handle in handles:
            handle.remove()
        raise
    return handles


def _observed(
    optimizer: Any,
    before: Hook | None,
    after: Hook,
    at_first_part: Callable[[Any], object] | None,
) -> list[Any]:
    """Observe one optimizer, and each call of a ``step`` that calls that of its parent class."""
    if _has_hooks(optimizer):
        handles: list[Any] = []
        if before is not None:
            handles.append(StepHook(optimizer, optimizer.register_step_pre_hook, before))
        handles.append(StepHook(optimizer, optimizer.register_step_post_hook, after))
        names = [name for name in _STEP_PARTS if callable(getattr(optimizer, name, None))]
        if len(names) > 1:
            handles.append(ObservedStepPart(optimizer, names[0], before, None, at_first_part))
            handles.append(ObservedStepPart(optimizer, names[-1], None, after))
        return handles
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"optimizer={shown(optimizer)}: expected an optimizer with a method step")
    try:
        return [ObservedMethod(optimizer, "step", before, after)]
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
