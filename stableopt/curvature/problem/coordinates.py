"""`Coordinates`: flat vectors to parameters and back, with scales, a sign and weight decay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.curvature.autodiff import dense
from stableopt.distributed.fsdp import local

__all__ = ["Coordinates"]


@dataclass(frozen=True)
class Coordinates:
    r"""The coordinates y of :math:`\pm f(\theta_0 + Dy) + \tfrac12\|\Lambda^{1/2}Dy\|^2`.

    Attributes:
        names: the parameters' names.
        shapes: their shapes, on this rank.
        dtype: the dtype of all vectors.
        device: the device of all vectors.
        sign: 1, or -1 for -f.
        scale: the diagonal of D: for each parameter a number, or a tensor of its shape.
        weight_decay: the diagonal of Lambda: a coefficient for each parameter.

    >>> shapes = [torch.Size([1, 2]), torch.Size([1])]
    >>> plain = Coordinates(["weight", "bias"], shapes, torch.float32, torch.device("cpu"))
    >>> scaled = plain.transformed(scale=[2.0, 1.0])
    >>> scaled.flatten([torch.ones(1, 2), None])
    tensor([2., 2., 0.])
    >>> scaled.unflatten(torch.ones(3))
    [tensor([[2., 2.]]), tensor([1.])]
    """

    names: Sequence[str]
    shapes: Sequence[torch.Size]
    dtype: torch.dtype
    device: torch.device
    sign: float = 1.0
    scale: tuple[Tensor | float, ...] = ()
    weight_decay: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.shapes)
        object.__setattr__(self, "scale", self.scale or (1.0,) * count)
        object.__setattr__(self, "weight_decay", self.weight_decay or (0.0,) * count)

    def transformed(
        self,
        *,
        sign: float = 1.0,
        scale: Sequence[Tensor | float] | None = None,
        weight_decay: Sequence[float] | None = None,
    ) -> Coordinates:
        """Return other coordinates of the same parameters.

        An omitted argument is 1, or zero weight decay; the present coordinates are dropped.

        Raises:
            ValueError: if the number of values, or a shape, differs from the parameters'.
        """
        for name, values in (("scale", scale), ("weight_decay", weight_decay)):
            if values is not None and len(values) != len(self.shapes):
                raise ValueError(
                    f"{name} has {len(values)} values: expected one for each of the"
                    f" {len(self.shapes)} parameters"
                )
        factors = (1.0,) * len(self.shapes) if scale is None else scale
        checked = (
            _checked_scale(name, factor, shape)
            for name, factor, shape in zip(self.names, factors, self.shapes, strict=True)
        )
        decays = () if weight_decay is None else weight_decay
        return dataclasses.replace(
            self, sign=sign, scale=tuple(checked), weight_decay=tuple(decays)
        )

    def masked(self, masks: Sequence[Tensor | None]) -> Coordinates:
        """Return the coordinates in which the entries with mask zero are constant."""
        masked = (
            factor if mask is None else factor * mask.to(self.dtype)
            for factor, mask in zip(self.scale, masks, strict=True)
        )
        return dataclasses.replace(self, scale=tuple(masked))

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return D times the concatenation ``(d,)`` of gradients; ``None`` counts as zero."""
        # The gradient of an embedding may be sparse, without a flat view.
        parts = [
            torch.zeros(shape.numel(), dtype=self.dtype, device=self.device)
            if t is None
            else _scaled(dense(t), factor).reshape(-1)
            for t, shape, factor in zip(tensors, self.shapes, self.scale, strict=True)
        ]
        return torch.cat(parts)

    def add_to(self, total: Tensor, tensors: Sequence[Tensor | None], weight: float) -> None:
        """Add ``weight`` times :meth:`flatten` of ``tensors`` to ``total`` ``(d,)``, in place."""
        add = self.adding_to(total, weight)
        for index, t in enumerate(tensors):
            if t is not None:
                add(index, t)

    def adding_to(self, total: Tensor, weight: float) -> Callable[[int, Tensor], None]:
        """Return ``add(index, tensor)``, which does :meth:`add_to` for a single parameter."""
        segments = torch.split(total, [shape.numel() for shape in self.shapes])

        def add(index: int, t: Tensor) -> None:
            scaled = _scaled(dense(t), self.scale[index]).reshape(-1)
            segments[index].add_(scaled, alpha=weight)

        return add

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return D times ``vector`` ``(d,)`` as a tensor for each parameter: a tangent."""
        segments = torch.split(vector, [shape.numel() for shape in self.shapes])
        return [
            _scaled(_aligned(segment.view(shape)), factor)
            for segment, shape, factor in zip(segments, self.shapes, self.scale, strict=True)
        ]

    def add_decay(self, product: Tensor, tangent: Sequence[Tensor]) -> None:
        r"""Add :math:`D\Lambda` times ``tangent`` to ``product``, in place."""
        if any(self.weight_decay):
            decays = zip(self.weight_decay, tangent, strict=True)
            product += self.flatten([decay * part for decay, part in decays])


def _aligned(part: Tensor) -> Tensor:
    # Copy possible real views of complex tensors: torch.view_as_complex takes no odd offsets.
    return part.clone(memory_format=torch.contiguous_format) if part.shape[-1:] == (2,) else part


def _checked_scale(name: str, factor: Tensor | float, shape: torch.Size) -> Tensor | float:
    if not isinstance(factor, Tensor):
        return float(factor)
    factor = local(factor)
    if factor.shape != shape:
        raise ValueError(
            f"scale of {name!r} has shape {tuple(factor.shape)}: expected {tuple(shape)}, or a number"
        )
    return factor.detach()


def _scaled(tensor: Tensor, factor: Tensor | float) -> Tensor:
    return tensor if isinstance(factor, float) and factor == 1.0 else tensor * factor
