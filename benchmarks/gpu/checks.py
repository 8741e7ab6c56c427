"""Parts that compare the device with the CPU: measurements, the suite's tests, one rank of NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch.distributed as dist
from torch import nn

import stableopt
from benchmarks.gpu.setting import ROOT, PartResult, Setting
from benchmarks.perf.lbfgs import host_waits
from benchmarks.training.data import Images
from benchmarks.training.loops import all_samples, mean_squared_error, train
from benchmarks.training.networks import WIDTHS, fully_connected
from stableopt.curvature import Hessian, NonUniformity, Problem, top_eigenpair

__all__ = ["measure", "one_rank", "tests"]

_STEPS = 200
"""Steps of gradient descent before a measurement."""

_KINDS = {"sharpness": Hessian, "non-uniformity": NonUniformity}


def _trained(setting: Setting, images: Images) -> nn.Module:
    model = fully_connected(WIDTHS[setting.data], seed=0).to(setting.device)
    optimizer = stableopt.GD(model.parameters(), lr=0.5)
    train(model, optimizer, all_samples(images), steps=5 if setting.miniature else _STEPS)
    return model


def measure(setting: Setting) -> PartResult:
    """Sharpness and non-uniformity next to the CPU's, their time, and how often the host waits."""
    images = setting.images()
    model = _trained(setting, images)
    tol = 0.1 if setting.miniature else 1e-3
    rows = []
    for name, operator_type in _KINDS.items():
        problem = Problem(model, mean_squared_error, images.samples)

        def search(problem: Problem = problem, operator_type: Any = operator_type) -> Any:
            return top_eigenpair(operator_type(problem), tol=tol, max_iter=300)

        search()  # warm-up
        setting.wait()
        start = time.perf_counter()
        pair = search()
        setting.wait()
        seconds = time.perf_counter() - start
        with host_waits(setting.device) as count:
            search()
        cpu_images = images.to("cpu")
        model.to("cpu")
        expected = top_eigenpair(
            operator_type(Problem(model, mean_squared_error, cpu_images.samples)),
            tol=tol,
            max_iter=300,
        )
        model.to(setting.device)
        row = {"quantity": name, "value": pair.value, "on_cpu": expected.value}
        row |= {"difference": abs(pair.value / expected.value - 1), "products": pair.products}
        rows.append({**row, "seconds": seconds, "waits_a_product": count["waits"] / pair.products})
    return PartResult(
        "; ".join(
            f"{row['quantity']} in {row['products']} products and {row['seconds']:.3g} s,"
            f" {row['waits_a_product']:.2f} waits a product, {row['difference']:.0e} from the CPU's"
            for row in rows
        ),
        rows,
    )


def tests(setting: Setting) -> PartResult:
    """The suite's tests of accelerators, on this one."""
    # Without the tests of the simulation itself.
    test_files = ["test_measurements.py", "test_products.py"]
    if setting.miniature:
        test_files = ["test_products.py::test_layers_with_structure"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-n", "0" if setting.miniature else "4"]
    command += [f"tests/simulated_device/{name}" for name in test_files]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "STABLEOPT_TEST_DEVICE": setting.device},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(process.stdout)
    last = process.stdout.strip().splitlines()[-1].strip("= ")
    if process.returncode:
        raise RuntimeError(f"pytest: {last}")
    return PartResult(last, [{"pytest": last}])


def one_rank(setting: Setting) -> PartResult:
    """Measurements by one rank of NCCL, next to those without a process group."""
    images = setting.images()
    model = _trained(setting, images)
    backend, data = "nccl", images
    if setting.miniature:  # gloo has no collectives on the simulated device
        backend, data = "gloo", images.to("cpu")
        model.to("cpu")

    def numbers() -> dict[str, float]:
        margins = stableopt.measure(
            *(model, mean_squared_error, data.samples),
            **{
                "lr": 0.5,
                "batch_size": 8,
                "quantities": tuple(q.replace("-", "_") for q in _KINDS),
            },
        )
        return {"sharpness": margins.sharpness, "non_uniformity": margins.non_uniformity}

    alone = numbers()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            together = numbers()
        finally:
            dist.destroy_process_group()
    rows = [
        {"quantity": name, "alone": alone[name], "one_rank": value, "backend": backend}
        for name, value in together.items()
    ]
    difference = max(abs(row["one_rank"] / row["alone"] - 1) for row in rows)
    if not difference < 1e-3:  # the tolerance of both measurements
        raise RuntimeError(f"one rank of {backend} differs from a lone process: {rows}")
    return PartResult(f"{backend}: within {difference:.0e} of a lone process", rows)
