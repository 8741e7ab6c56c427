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
        weight_decay: the diagonal of Lambda, in the same form.

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
    weight_decay: tuple[Tensor | float, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.shapes)
        object.__setattr__(self, "scale", self.scale or (1.0,) * count)
        object.__setattr__(self, "weight_decay", self.weight_decay or (0.0,) * count)

    def transformed(
        self,
        *,
        sign: float = 1.0,
        scale: Sequence[Tensor | float] | None = None,
        weight_decay: Sequence[Tensor | float] | None = None,
    ) -> Coordinates:
        """Return other coordinates of the same parameters.

        An omitted argument is 1, or zero weight decay; the present coordinates are dropped.

        Raises:
            ValueError: if the number of values, or a shape, differs from the parameters'.
        """
        return dataclasses.replace(
            self,
            sign=sign,
            scale=self._checked("scale", scale),
            weight_decay=self._checked("weight_decay", weight_decay),
        )

    def _checked(
        self, what: str, diagonal: Sequence[Tensor | float] | None
    ) -> tuple[Tensor | float, ...]:
        """Return a diagonal as numbers and local tensors, empty for ``None``."""
        if diagonal is None:
            return ()
        if len(diagonal) != len(self.shapes):
            raise ValueError(
                f"{what} has {len(diagonal)} values: expected one for each of the"
                f" {len(self.shapes)} parameters"
            )
        parts = zip(self.names, diagonal, self.shapes, strict=True)
        return tuple(
            _checked_part(f"{what} of {name!r}", part, shape) for name, part, shape in parts
        )

    @property
    def decays(self) -> bool:
        """Whether Lambda is not zero."""
        return any(isinstance(decay, Tensor) or decay for decay in self.weight_decay)

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
        if self.decays:
            decays = zip(self.weight_decay, tangent, strict=True)
            product += self.flatten([decay * part for decay, part in decays])


def _aligned(part: Tensor) -> Tensor:
    # Copy possible real views of complex tensors: torch.view_as_complex takes no odd offsets.
    return part.clone(memory_format=torch.contiguous_format) if part.shape[-1:] == (2,) else part


def _checked_part(name: str, part: Tensor | float, shape: torch.Size) -> Tensor | float:
    if not isinstance(part, Tensor):
        return float(part)
    part = local(part)
    if part.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(part.shape)}: expected {tuple(shape)}, or a number"
        )
    return part.detach()


def _scaled(tensor: Tensor, factor: Tensor | float) -> Tensor:
    return tensor if isinstance(factor, float) and factor == 1.0 else tensor * factor
