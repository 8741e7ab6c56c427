"""`sketch`: a short linear image of a long vector, whose norm and distances are about the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["sketch"]

_SIZE = 1024
"""Numbers in a sketch: its norm is then that of the vector to about 2 %, a relative error of
sqrt(1/(2 * 1024))."""

_BLOCK = 2**22
"""Numbers for which signs are drawn. Longer vectors use them again, shifted."""

_SHIFT = 1_234_567
"""Of the signs from block to block. It is odd, so that a thousand blocks all add different signs to a
place: a constant vector would otherwise add the same sums again and again."""


def sketch(parts: Iterable[Tensor], device: torch.device | str = "cpu") -> Tensor:
    """Return 1,024 sums, with random signs, of the numbers of all ``parts``.

    The same places have the same signs in every call. A part may be of any shape, and is read in blocks.

    >>> whole = torch.ones(9_000_000)
    >>> found = sketch([whole])
    >>> len(found), 0.9 < float(found.norm() / whole.norm()) < 1.1
    (1024, True)
    """
    device = torch.device(device)
    exact = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(_SIZE, dtype=exact, device=device)
    signs = torch.empty(0, dtype=torch.int8, device=device)
    begun = 0
    for part in parts:
        numbers = part.reshape(-1)
        needed = min(len(numbers), _BLOCK)
        if len(signs) < needed:
            # On the host, so that the signs are the same on every device.
            dice = torch.Generator().manual_seed(0)
            drawn = torch.randint(0, 2, (needed,), generator=dice, dtype=torch.int8)
            signs = drawn.mul_(2).sub_(1).to(device)
        for block in torch.split(numbers, _BLOCK):
            own = signs.roll(begun * _SHIFT)[: len(block)]
            signed = torch.nn.functional.pad(block.to(exact) * own, (0, -len(block) % _SIZE))
            total += signed.view(-1, _SIZE).sum(0)
            begun += 1
    return total
