"""The memory that products take stays below a ceiling for every n."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from hidden import HiddenGain
from peak_memory import STATUS, peak_mib, peak_of_process
from torch import nn

from stableopt.curvature import GaussNewton, Hessian, NonUniformity, Problem, top_eigenpair

MIB = 2**20


class Opaque(nn.Module):
    """A model with a gain in a custom function, so that no structure holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.second = nn.Parameter(torch.randn(width, 1) / width**0.5)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return HiddenGain.apply(torch.tanh(x @ self.first) @ self.second, self.gain)


def grown(method: str, samples: int, memory: int) -> float:
    """Return by how many MiB a measurement of s and a raised the process's peak memory."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if method == "structured":
        width = 600
        model: nn.Module = nn.Sequential(
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        )
    else:
        width = 600 if method == "loop" else 100
        model = Opaque(width)
    x, y = torch.randn(samples, width), torch.randn(samples, 1)
    problem = Problem(model, nn.MSELoss(), (x, y))
    # First on a few samples: that run sets up torch.
    small = Problem(model, nn.MSELoss(), (x[:4], y[:4]))
    for measured in (small, problem):
        before = peak_mib()
        sigma = NonUniformity(measured, memory=memory)
        top_eigenpair(sigma, max_iter=2)
        top_eigenpair(Hessian(measured, memory=memory), max_iter=2)
    assert sigma.method == method
    return peak_mib() - before


@pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("method", "samples", "memory", "per_sample_mib", "ceiling"),
    [
        ("structured", 2000, 16 * MIB, 2.7, 250),
        ("vmap", 4000, 16 * MIB, 0.04, 80),
        ("loop", 200, MIB, 1.4, 80),
    ],
)
def test_peak_memory_does_not_grow_with_samples_times_parameters(
    method: str, samples: int, memory: int, per_sample_mib: float, ceiling: float
) -> None:
    """Catches per-sample gradients of all samples held at once, and passes kept beyond the budget.

    Each case runs in a fresh process, since peaks never fall. A sample's gradient takes
    ``per_sample_mib``, so those of all samples take from 160 MiB to 5 GiB. The ceilings leave room
    for two operators, each with what it keeps, one chunk's intermediates and the allocator's slack:
    145, 21 and 12 MiB were seen, and as much with four times as many samples.
    """
    code = f"from test_memory import grown; print(grown({method!r}, {samples}, {memory}))"
    assert peak_of_process(code, Path(__file__).parent) < ceiling < samples * per_sample_mib


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, NonUniformity])
def test_passes_end_with_their_operator(kind: type) -> None:
    """Catches an operator in a reference cycle, whose cached passes outlive it."""
    problem = Problem(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
    gc.disable()
    try:
        operator = kind(problem)
        _ = operator @ torch.ones(3)
        reference = weakref.ref(operator)
        del operator
        assert reference() is None
    finally:
        gc.enable()
