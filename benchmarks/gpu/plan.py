"""`PARTS`: what to run on a GPU, in order of value, each with the time that it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import checks, timings
from benchmarks.gpu.setting import Found, Setting

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True)
class Part:
    """A part of the script.

    Attributes:
        seconds: the most that it may take.
        run: the part itself; the first line of its docstring is its title.
    """

    seconds: float
    run: Callable[[Setting], Found]

    @property
    def title(self) -> str:
        """What it does, in one line."""
        return (self.run.__doc__ or "").splitlines()[0]


PARTS = {
    "measure": Part(60, checks.measure),
    "tests": Part(120, checks.tests),
    "ensemble": Part(60, timings.ensembles),
    "graphs": Part(45, timings.graphs),
    "nccl": Part(45, checks.one_rank),
    "table-2": Part(90, timings.table_2),
    "tracking": Part(45, timings.tracked),
    "eigenvalues": Part(90, timings.largest_eigenvalues),
    "products": Part(60, timings.all_products),
    "along-step": Part(30, timings.losses_along_step),
    "lbfgs": Part(60, timings.iterations_of_lbfgs),
    "table-2-small-rates": Part(180, timings.table_2_small_rates),
}
"""The parts by name, the most valuable first."""
