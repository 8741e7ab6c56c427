"""`Precision`: the precision in which a problem is evaluated, and the necessary casts.

Curvature is a difference of nearly equal slopes, and half precision loses most of it. So a model is
measured in its parameters' own single or double precision, even if it trains under autocast. A chosen
dtype of ``float32`` or ``float64`` casts parameters, buffers and data; ``bfloat16`` or ``float16`` keeps
the parameters as they are, and runs the forward pass under autocast, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.isolation.in_double import InDouble

__all__ = ["Precision"]

_FULL = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """Dtype, device and casts of an evaluation.

    Attributes:
        dtype: the dtype of parameters and vectors: single or double precision.
        device: the device of the parameters.
        casts: whether floating-point tensors are cast to ``dtype``.
        autocast: the dtype of autocast around the forward pass, or ``None`` without autocast.
        promotes: whether single precision inside the model becomes double precision.

    >>> Precision.of_parameters(["weight"], [nn.Parameter(torch.zeros(2))], torch.float64).note
    'in float64'
    """

    dtype: torch.dtype
    device: torch.device
    casts: bool = False
    autocast: torch.dtype | None = None
    promotes: bool = False

    @classmethod
    def of_parameters(
        cls, names: Sequence[str], params: Sequence[nn.Parameter], chosen: torch.dtype | None
    ) -> Precision:
        """Return the precision in which to measure ``params``: ``chosen``, or their own.

        Raises:
            ValueError: for parameters without values, on several devices or of several dtypes, and
                for an unsupported ``chosen``.
            TypeError: for parameters that are not floating-point numbers, real or complex, of single
                or double precision.
        """
        if chosen is not None and chosen not in (*_FULL, *_HALF):
            raise ValueError(
                f"dtype={chosen}: expected torch.float32 or torch.float64, or torch.bfloat16 or"
                " torch.float16 to measure under autocast"
            )
        cast = chosen if chosen in _FULL else None
        first = params[0]
        kinds = [p.dtype.to_real() if p.is_complex() else p.dtype for p in params]
        for name, p, kind in zip(names, params, kinds, strict=True):
            if isinstance(p, nn.UninitializedParameter):
                raise ValueError(
                    f"parameter {name!r} has no shape yet: run the lazy model once before measuring it"
                )
            if not kind.is_floating_point or (cast is None and kind not in _FULL):
                hint = ""
                if kind.is_floating_point:
                    hint = "; pass dtype=torch.float32 to cast it for the measurement"
                raise TypeError(
                    f"parameter {name!r} has dtype {p.dtype}: curvature needs float32 or float64"
                    f"{hint}, or leave it out by params="
                )
            if p.device != first.device or (cast is None and kind != kinds[0]):
                same_device = p.device == first.device
                remedy = "; dtype=torch.float64 casts all of them" if same_device else ""
                raise ValueError(
                    f"parameter {name!r} is {p.dtype} on {p.device}, but {names[0]!r} is"
                    f" {first.dtype} on {first.device}: expected one dtype and one device{remedy}"
                )
        if first.device.type == "meta":
            raise ValueError(f"parameter {names[0]!r} is on the meta device: it has no values")
        return cls(
            cast or kinds[0],
            first.device,
            casts=cast is not None,
            autocast=chosen if chosen in _HALF else None,
            # No cast reaches single-precision tensors that the loss holds.
            promotes=cast is torch.float64 and any(kind != cast for kind in kinds),
        )

    def cast(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, cast if single or double precision was chosen."""
        if self.casts and tensor.is_floating_point():
            return tensor.to(self.dtype)
        if self.casts and tensor.is_complex():
            return tensor.to(self.dtype.to_complex())
        return tensor

    def in_double(self) -> Precision:
        """Return double precision throughout, even where the model casts to single precision."""
        return replace(self, dtype=torch.float64, casts=True, autocast=None, promotes=True)

    def around(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        if self.promotes:
            return InDouble()
        return torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        )

    @property
    def note(self) -> str | None:
        """The chosen precision in words, or ``None`` for the parameters' own."""
        if self.autocast is not None:
            return f"under autocast to {str(self.autocast).removeprefix('torch.')}"
        return f"in {str(self.dtype).removeprefix('torch.')}" if self.casts else None
