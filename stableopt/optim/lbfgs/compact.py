"""`CompactPairs`: L-BFGS directions in compact form, from ring buffers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.products.blocked_rows import Rows, widest
from stableopt.curvature.products.inverse_hessian import InverseHessian
from stableopt.optim.lbfgs.line_search import Number
from stableopt.optim.lbfgs.memory import Move, damped_share
from stableopt.optim.lbfgs.objective import wide_dot

__all__ = ["CompactPairs"]


class CompactPairs:
    """A memory of pairs in ring buffers, with their inner products.

    An iteration reads the buffers twice: for the products with gradient change and gradient, and for
    the direction. It allocates one vector of length d, the direction.
    """

    def __init__(self, capacity: int, state: dict[str, Any]) -> None:
        self.capacity = capacity
        # Row 0 is the last gradient change, row 1 the gradient: both take one pass over the pairs.
        self._latest: Tensor | None = None
        self.clear()
        if state.get("old_dirs"):
            self._load(state)

    def clear(self) -> None:
        """Remove all pairs."""
        self._count = self._oldest = 0
        self._gamma = 1.0
        self._products_missing = False

    def _allocate(self, like: Tensor) -> None:
        """Allocate the buffers, once."""
        if not hasattr(self, "_rows"):
            dtype = widest(like.device)
            self._rows = Rows(2 * self.capacity, like)
            self._triangle = like.new_zeros(self.capacity, self.capacity, dtype=dtype)
            self._squares = torch.zeros_like(self._triangle)
            limits = torch.finfo(like.dtype)
            self._smallest_cosine, self._smallest_product = limits.eps, limits.tiny

    def _load(self, state: dict[str, Any]) -> None:
        changes = state["old_dirs"][-self.capacity :]
        steps = state["old_stps"][-self.capacity :]
        self._allocate(changes[0])
        self._latest = changes[0].new_empty(2, len(changes[0]))
        kept = state.get("compact") or {}
        if (
            kept.get("func_evals") == state.get("func_evals")
            and kept.get("count") == len(changes)
            and (kept["oldest"] == 0 or len(changes) == self.capacity)
        ):
            # This class wrote the state: its numbers make a resumed run bit for bit the same.
            self._oldest, self._count = kept["oldest"], len(changes)
            for i, (y, s) in enumerate(zip(changes, steps, strict=True)):
                self._write(self._slot(i), y, s, 1.0)
            part, square = slice(0, self._count), (self._count, self._count)
            for small, name in ((self._triangle, "triangle"), (self._squares, "squares")):
                small[part, part] = small.new_tensor(kept[name]).view(square)
            self._gamma = kept["gamma"]
            return
        for y, s in zip(changes, steps, strict=True):
            self._latest[0] = y
            self._append(y, s, 1.0)
            self._update_products()
        self._gamma = float(state.get("H_diag", 1.0))

    def numbers(self, *values: Any) -> list[Number]:
        """Return floats: all tensors among ``values`` in one transfer."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        if not tensors:
            return [float(value) for value in values]
        # The loss may have another device or dtype than the last tensor, which is from gradients.
        last = tensors[-1]
        if any(value.dtype != last.dtype or value.device != last.device for value in tensors):
            tensors = [value.to(last.device, widest(last.device)) for value in tensors]
        floats = iter(torch.stack([value.reshape(()) for value in tensors]).tolist())
        return [next(floats) if isinstance(v, Tensor) else float(v) for v in values]

    def products(self, move: Move, gradient: Tensor) -> list[Tensor]:
        """Return the inner products by which :meth:`update` accepts the pair."""
        if self._latest is None or self._latest.shape[1] != len(gradient):
            self._latest = gradient.new_empty(2, len(gradient))
        y, direction = torch.sub(gradient, move.gradient, out=self._latest[0]), move.direction
        return [wide_dot(y, direction), wide_dot(y, y), wide_dot(direction, direction)]

    def update(self, move: Move, gradient: Tensor, products: list[Number], damping: float) -> None:
        """Keep the pair of a move that ended at ``gradient``, if it has curvature."""
        direction, t = move.direction, move.t
        curvature, change, step = products[0] * t, products[1], products[2] * t * t
        assert self._latest is not None  # `products` wrote the change
        y = self._latest[0]
        if damping and self._count:
            share = damped_share(curvature, step / self._gamma, damping)
            if share < 1:
                rest = (1 - share) / self._gamma
                y.mul_(share).add_(direction, alpha=rest * t)
                change = share**2 * change + 2 * share * rest * curvature + rest**2 * step
                curvature = share * curvature + rest * step
        self._allocate(y)
        threshold = self._smallest_cosine * math.sqrt(change) * math.sqrt(step)
        # Subnormal products have lost digits: they are rounding noise.
        normal = min(curvature, change) >= self._smallest_product
        if curvature > threshold and normal and math.isfinite(curvature + change):
            self._append(y, direction, t)
            self._gamma = curvature / change

    def _slot(self, index: int) -> int:
        return (self._oldest + index) % self.capacity

    def _write(self, slot: int, y: Tensor, direction: Tensor, t: Number) -> None:
        self._rows.write(2 * slot, direction, float(t))
        self._rows.write(2 * slot + 1, y)

    def _append(self, y: Tensor, direction: Tensor, t: Number) -> None:
        if self._count == self.capacity:
            self._oldest = self._slot(1)
            self._count -= 1
            for small in (self._triangle, self._squares):
                small[:-1, :-1] = small[1:, 1:].clone()
        self._write(self._slot(self._count), y, direction, t)
        self._count += 1
        self._products_missing = True

    def _update_products(self, vector: Tensor | None = None) -> Tensor:
        """Store the inner products of a pair just appended; return those of ``vector``, if given."""
        missing, self._products_missing = self._products_missing, False
        if self._latest is not None and vector is not None:
            self._latest[1] = vector
        rows = slice(0 if missing else 1, 1 if vector is None else 2)
        if rows.start == rows.stop:
            return self._triangle.new_zeros(0)
        assert self._latest is not None
        inner = self._rows.inner(self._latest[rows], 2 * self._count)
        if missing:
            last, part = self._count - 1, slice(0, self._count)
            small = inner[0].view(-1, 2).roll(-self._oldest, dims=0)
            self._triangle[part, last] = small[:, 0]
            self._triangle[last, :last] = 0
            self._squares[part, last] = self._squares[last, part] = small[:, 1]
        return inner[-1]

    def inverse_hessian(self) -> InverseHessian:
        """Return the matrix, which is valid until the next :meth:`update`."""
        part = slice(0, self._count)
        return InverseHessian(
            self._rows,
            self._oldest,
            self._triangle[part, part],
            self._squares[part, part],
            self._gamma,
        )

    def descent(self, gradient: Tensor) -> Tensor:
        """Return -P times ``gradient``, which does not change."""
        if not self._count:
            return gradient.mul(-self._gamma)
        inner = self._update_products(gradient)
        return self.inverse_hessian().from_inner(gradient, inner, sign=-1)

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return P times ``(d,)`` or ``(d, k)``."""
        if not self._count:
            return vectors * self._gamma
        self._update_products()
        return self.inverse_hessian() @ vectors

    def export(self) -> dict[str, Any]:
        """Return the pairs in the form of the state of ``torch.optim.LBFGS``."""
        if not self._count:
            return {"old_dirs": [], "old_stps": [], "ro": [], "H_diag": self._gamma}
        self._update_products()
        part, slots = slice(0, self._count), [self._slot(i) for i in range(self._count)]
        diagonal = self._triangle.diagonal()[part].to(self._rows.dtype)
        return {
            "old_dirs": [self._rows.read(2 * slot + 1) for slot in slots],
            "old_stps": [self._rows.read(2 * slot) for slot in slots],
            "ro": list((1.0 / diagonal).unbind()),
            "H_diag": diagonal.new_tensor(self._gamma),
            "compact": {
                "count": self._count,
                "oldest": self._oldest,
                "gamma": self._gamma,
                "triangle": self._triangle[part, part].tolist(),
                "squares": self._squares[part, part].tolist(),
            },
        }
