"""An accelerator in Python: device ``"simulated"``, its tensors in CPU memory, its transfers counted.

As on a GPU, operations that mix its tensors with the CPU's fail, and a number reaches Python only by
a transfer. Streams, fused kernels, its own random numbers and its memory are not simulated. The
interface of torch underneath is experimental. It changes the process that uses it for good, so that
:func:`on_both` runs in one of its own.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import CONTEXT
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

NAME = "simulated"

DEVICE = os.environ.get("STABLEOPT_TEST_DEVICE", NAME)
"""Where :func:`on_both` runs after the CPU. On ``"cuda"`` both run in double precision, in which the
bars leave room for the rounding of another processor, and transfers are not counted."""

try:
    from torch.utils import backend_registration

    _USED = ("_setup_privateuseone_for_python_backend", "_DummyBackendModule")
    _missing = not all(hasattr(backend_registration, name) for name in _USED)
except ImportError:
    _missing = True

NEEDS_SIMULATED_DEVICE = pytest.mark.skipif(
    _missing and DEVICE == NAME,
    reason=f"torch {torch.__version__} cannot register a device written in Python",
)

TIMEOUT = 120
"""Seconds after which a run counts as hanging."""


@dataclass
class Transfers:
    """Copies between the device and the host.

    Attributes:
        to_host: tensors and numbers read by the host; each read waits for the device.
        to_device: tensors sent by the host.
        places: lines of the library that made the host read, and how often.
    """

    to_host: int = 0
    to_device: int = 0
    places: Counter[str] = field(default_factory=Counter)

    def places_in(self, path: str) -> int:
        """Return the reads by the module at ``path``."""
        return sum(count for place, count in self.places.items() if path in place)

    def read(self) -> None:
        self.to_host += 1
        frame: Any = sys._getframe()
        while frame is not None:
            path = frame.f_code.co_filename
            if "/stableopt/" in path and "/tests/" not in path:
                where = path.rpartition("/stableopt/")[2]
                self.places[f"{where}:{frame.f_lineno}"] += 1
                return
            frame = frame.f_back
        self.places["elsewhere"] += 1


class Counting:
    """Within it, transfers are counted: ``with Counting() as transfers: ...``."""

    active: list[Transfers] = []  # noqa: RUF012

    def __enter__(self) -> Transfers:
        self.transfers = Transfers()
        self.active.append(self.transfers)
        return self.transfers

    def __exit__(self, *_: object) -> None:
        self.active.pop()  # the innermost


def _read() -> None:
    for transfers in Counting.active:
        transfers.read()


def _sent() -> None:
    for transfers in Counting.active:
        transfers.to_device += 1


class OnDevice(Tensor):
    """A tensor on the simulated device; ``held`` is the CPU tensor that has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(op, args, kwargs or {})

    # What torch reads from C++ memory, where a wrapper has none.
    def tolist(self) -> Any:
        _read()
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save as from a device read with ``map_location="cpu"``."""
        _read()
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        """Copy a leaf without its gradient; torch's own way writes to C++ memory."""
        if id(self) not in memo:
            copied = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = (
                torch.nn.Parameter(copied, self.requires_grad)
                if is_parameter
                else copied.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    def new_tensor(self, data: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(self.device)


_TAKE_BOTH = {
    "aten::_to_copy",
    "aten::copy_",
    "aten::_copy_from",
    "aten::index.Tensor",
    "aten::index",
    "aten::_index_put_impl_",
    "aten::index_put_",
}
"""Operations that a GPU allows with tensors of the CPU, such as indices."""

_GIVE_TO_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}
"""Operations whose result, or its shape, the host waits for."""


def _computed(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU tensors within, and return what lies on the device wrapped."""
    name = op._schema.name
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    # Tensors without dimensions count as numbers.
    foreign = [t for t in tensors if not isinstance(t, OnDevice) and t.dim()]
    if here and foreign and name not in _TAKE_BOTH:
        raise RuntimeError(f"{name}: expected tensors on one device, found {NAME} and cpu")
    if name in _GIVE_TO_HOST:
        _read()
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    on_device = bool(here) if target is None else target.type == NAME
    if name == "aten::_to_copy" and on_device != bool(here):
        (_sent if on_device else _read)()
    if name in ("aten::copy_", "aten::_copy_from"):
        source, goal = tensors[:2] if name == "aten::_copy_from" else tensors[1::-1]
        if isinstance(source, OnDevice) != isinstance(goal, OnDevice):
            (_sent if isinstance(goal, OnDevice) else _read)()
    inside, named = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, kwargs))
    if target is not None:
        named["device"] = torch.device("cpu")
    named.pop("pin_memory", None)
    result = op(*inside, **named)
    known = {id(tensor.held): tensor for tensor in here}

    def outside(value: Any) -> Any:
        if isinstance(value, Tensor) and on_device:
            return known[id(value)] if id(value) in known else OnDevice(value)
        return value

    if name == "aten::copy_":
        return tensors[0]
    wrapped = tree_map(outside, result)
    if torch.Tag.inplace_view in op.tags:  # the wrapper changes its own shape too
        with torch.utils._mode_utils.no_dispatch():
            op(*args, **kwargs)
    return wrapped


_FACTORIES = (
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "full"),
    *("randperm", "randperm.generator", "tril_indices", "triu_indices"),
)
"""Operations that make a tensor from numbers and have a kernel for any device, so no fallback."""

_libraries: list[Any] = []


def install() -> None:
    """Add the device to this process, which must not have differentiated anything yet."""
    if _libraries:
        return
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(
        NAME, backend_module=_module()
    )
    every = torch.library.Library("_", "IMPL")
    every.fallback(lambda op, *a, **k: _computed(op, a, k), dispatch_key="PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for factory in _FACTORIES:
        packet, _, overload = factory.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(factory, lambda *a, _op=op, **k: _computed(_op, a, k), "PrivateUse1")
    _libraries.extend([every, aten])
    _give_generators_of_the_cpu()


def _module() -> Any:
    class Module(backend_registration._DummyBackendModule):
        """What torch asks of ``torch.<device>``; random numbers are the CPU's."""

        get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
        set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
        synchronize = staticmethod(lambda device=None: None)
        manual_seed = staticmethod(torch.manual_seed)
        get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])

    return Module()


def _give_generators_of_the_cpu() -> None:
    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Generator:
            device = torch.device(device)
            return super().__new__(cls, "cpu" if device.type == NAME else device)

    torch.Generator = Generator  # type: ignore[misc]


def on_both(worker: Callable[..., Any], folder: Path, *args: Any) -> tuple[Any, Any, Transfers]:
    """Return ``worker(device, *args)`` on the CPU and on the device, and the second's transfers.

    ``worker`` is a function of a module in ``tests/helpers``, and returns what ``torch.save`` takes.
    """
    path = folder / "found.pt"
    process = CONTEXT.Process(target=_both, args=(worker, path, args))
    process.start()
    process.join(TIMEOUT)
    process.kill()
    process.join()
    assert path.exists(), f"{worker.__name__} did not return within {TIMEOUT} s, or died"
    cpu, device, transfers, error = torch.load(path, weights_only=False)
    assert not error, error
    return cpu, device, transfers


def _both(worker: Callable[..., Any], path: Path, args: Any) -> None:
    torch.set_num_threads(1)
    try:
        if DEVICE == NAME:
            install()
        else:
            torch.set_default_dtype(torch.float64)
        cpu = worker("cpu", *args)
        with Counting() as transfers:
            device = worker(DEVICE, *args)
        torch.save((cpu, device, transfers, None), path)
    except BaseException:
        torch.save((None, None, None, traceback.format_exc()), path)
