"""`PARTS`: the parts to run on a GPU, in order of value, with their time limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import checks, timings
from benchmarks.gpu.setting import PartResult, Setting

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True)
class Part:
    """A part of the script.

    Attributes:
        seconds: its time limit.
        run: its function; the first line of the docstring is the title.
    """

    seconds: float
    run: Callable[[Setting], PartResult]

    @property
    def title(self) -> str:
        """Description in one line."""
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
