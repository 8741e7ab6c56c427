"""`sketch`: a random projection of a long vector that approximately preserves norms and distances."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["sketch"]

_SIZE = 1024
"""Length of a sketch. Its norm has a relative error of sqrt(1/(2 * 1024)), 2 %."""

_BLOCK = 2**22
"""Number of random signs. Further blocks of a vector use the same signs, shifted."""

_SHIFT = 1_234_567
"""Shift of the signs from block to block. It is odd, so that a thousand blocks have different signs at a
position. Without it, all blocks of a constant vector would add the same sums."""


def sketch(parts: Iterable[Tensor], device: torch.device | str = "cpu") -> Tensor:
    """Return 1,024 sums of the entries of all ``parts``, with random signs.

    Equal positions have equal signs in every call. Parts of any shape are read in blocks.

    >>> vector = torch.ones(9_000_000)
    >>> sums = sketch([vector])
    >>> len(sums), 0.9 < float(sums.norm() / vector.norm()) < 1.1
    (1024, True)
    """
    device = torch.device(device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(_SIZE, dtype=dtype, device=device)
    signs = torch.empty(0, dtype=torch.int8, device=device)
    num_blocks = 0
    for part in parts:
        entries = part.reshape(-1)
        needed = min(len(entries), _BLOCK)
        if len(signs) < needed:
            # On the host, so that the signs are the same on every device.
            generator = torch.Generator().manual_seed(0)
            bits = torch.randint(
                0, 2, (needed,), generator=generator, dtype=torch.int8, device="cpu"
            )
            signs = bits.mul_(2).sub_(1).to(device)
        for block in torch.split(entries, _BLOCK):
            block_signs = signs.roll(num_blocks * _SHIFT)[: len(block)]
            signed = block.to(dtype) * block_signs
            padded = torch.nn.functional.pad(signed, (0, -len(block) % _SIZE))
            total += padded.view(-1, _SIZE).sum(0)
            num_blocks += 1
    return total
