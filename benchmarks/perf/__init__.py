"""Timings of this library and others in one process: ``python -m benchmarks perf [PART ...]``."""

from __future__ import annotations

PARTS = {
    "products": "benchmarks.perf.products",
    "models": "benchmarks.perf.models",
    "eigenvalues": "benchmarks.perf.eigenvalues",
    "spectrum": "benchmarks.perf.spectrum",
    "tracking": "benchmarks.perf.tracking",
    "along-step": "benchmarks.perf.along_step",
    "growth": "benchmarks.perf.growth",
    "compiled": "benchmarks.perf.compiled",
    "lbfgs": "benchmarks.perf.lbfgs",
    "ensemble": "benchmarks.perf.ensemble",
    "imports": "benchmarks.perf.imports",
    "large": "benchmarks.perf.large",
}
"""The modules of the parts, each with ``Config`` and ``run(config)``."""

BY_DEFAULT = tuple(name for name in PARTS if name != "large")
"""The parts that run by default: ``large`` takes a quarter of an hour, and gigabytes."""
