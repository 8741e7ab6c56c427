"""Collectives over the ranks that measure together."""

from stableopt.distributed.collectives import LostRankError, Ranks, world

__all__ = ["LostRankError", "Ranks", "world"]
