"""Runs of the library on a given device, for `simulated_device.on_both`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from oracles import SineOnce
from simulated_device import Counting
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stableopt
from stableopt.curvature import (
    GaussNewton,
    Hessian,
    NonUniformity,
    Operator,
    Problem,
    top_eigenpair,
)

MSE = nn.MSELoss()

MONITORED = ("sharpness", "preconditioned_sharpness", "realised_edge", "critical_sharpness")


def network(device: str, hidden: int = 1, width: int = 4) -> nn.Module:
    """Return a network of 2 + 2 ``hidden`` parameter tensors."""
    torch.manual_seed(0)
    widths = [3] + [width] * hidden
    layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 2)).to(device)


def samples(device: str, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator)
    return x.to(device), torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1]], 1).to(device)


OPERATORS: dict[str, Any] = {
    "hessian": Hessian,
    "gauss_newton": GaussNewton,
    "structured": lambda problem: NonUniformity(problem, method="structured"),
    "vmap": lambda problem: NonUniformity(problem, method="vmap"),
    "loop": lambda problem: NonUniformity(problem, method="loop"),
}


class Layers(nn.Module):
    """Embedding, normalisation and convolution, whose products have structure."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(5, 3), nn.LayerNorm(3)
        self.convolution, self.head = nn.Conv1d(3, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(x)).mT
        return self.head(self.convolution(hidden).tanh().mean(2))


class Sine(nn.Module):
    """A sine that can be differentiated only once."""

    def forward(self, x: Tensor) -> Tensor:
        return SineOnce.apply(x)


def differenced(device: str) -> dict[str, Any]:
    """Return a product by finite differences in float64, and what the solver finds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Sine(), nn.Linear(4, 2)).to(device)
    hessian = Hessian(Problem(model, MSE, samples(device), dtype=torch.float64))
    vector = torch.randn(hessian.shape[0], generator=torch.Generator().manual_seed(2))
    product = (hessian @ vector.to(device, torch.float64)).cpu()
    assert hessian.differences is not None
    return {"product": product, **_top(hessian)}


def of_layers(device: str) -> dict[str, Any]:
    """Return a structured product, and how each parameter is treated."""
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randint(0, most, size, generator=generator) for most, size in ((5, (8, 4)), (3, (8,)))
    )
    data = x.to(device), y.to(device)
    sigma = NonUniformity(
        Problem(Layers().to(device), nn.CrossEntropyLoss(), data), method="structured"
    )
    vector = torch.randn(sigma.shape[0], generator=generator).to(device)
    return {"ways": sigma.ways, "product": (sigma @ vector).cpu()}


def eigenpair(device: str, name: str) -> dict[str, Any]:
    """Return products with three vectors, what the solver finds, and the reads of the host."""
    operator: Operator = OPERATORS[name](Problem(network(device), MSE, samples(device)))
    vectors = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(2))
    images = torch.stack([operator @ v for v in vectors.to(device).T]).cpu()
    return {"images": images, **_top(operator)}


def _top(operator: Operator) -> dict[str, Any]:
    """Return what the solver finds, its products, and the reads of the host."""
    with Counting() as transfers:
        found = top_eigenpair(operator, tol=1e-4)
    return {"value": found.value, "products": found.products, "reads": transfers.to_host}


def optimizers(name: str, model: nn.Module) -> Any:
    """Return the optimizer of that name, or two of momenta that differ."""
    if name != "two":
        return getattr(torch.optim, name)(model.parameters(), lr=0.01)
    weights, biases = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
    return [torch.optim.SGD(weights, lr=0.1, momentum=0.9), torch.optim.SGD(biases, lr=0.1)]


def _measured(device: str, quantities: list[str], name: str) -> dict[str, float]:
    model = network(device, width=2)
    asked: dict[str, Any] = {"lr": 0.1}
    if name:
        stepped = asked["optimizer"] = optimizers(name, model)
        del asked["lr"]
        MSE(model(samples(device)[0]), samples(device)[1]).backward()
        for optimizer in stepped if isinstance(stepped, list) else [stepped]:
            optimizer.step()
    margins = stableopt.measure(
        model, MSE, samples(device), batch_size=4, quantities=quantities, tol=1e-5, **asked
    )
    return _numbers(margins.record())


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, (int, float)) and "seconds" not in name and "overhead" not in name
    }


def measured(device: str, asked: dict[str, list[str]]) -> list[dict[str, float]]:
    """Return the quantities asked of each optimizer, or of none."""
    return [_measured(device, quantities, name) for name, quantities in asked.items()]


def all_reads(device: str) -> dict[str, dict[str, int]]:
    """Return how often the host reads in a first measurement, but for once a product."""
    if device == "cpu":
        return {}
    cases = {"4 tensors": (1, 12), "24 tensors": (11, 12), "48 samples": (1, 48)}
    return {
        quantity: {case: _reads(device, quantity, *size) for case, size in cases.items()}
        for quantity in ("sharpness", "non_uniformity")
    }


def _reads(device: str, quantity: str, hidden: int, n: int) -> int:
    model, data = network(device, hidden), samples(device, n)
    with Counting() as transfers:
        stableopt.measure(model, MSE, data, lr=0.1, batch_size=4, quantities=(quantity,), tol=1e-2)
    return transfers.to_host - transfers.places_in("eigen/inner_product.py")


def trained(device: str, name: str) -> dict[str, Any]:
    """Return what a tracked optimizer measures, the weights, and the reads of a later measurement."""
    # More parameters than three times what a search keeps, so that the next one follows it.
    model, (x, y) = network(device, hidden=3), samples(device)
    options: dict[str, Any] = {"lr": 0.05} if name != "LBFGS" else {"lr": 0.5, "max_iter": 4}
    if name in ("SGD", "GD", "LBFGS"):
        optimizer = getattr(stableopt, name)(model.parameters(), **options)
        monitor = optimizer.track(model, MSE, (x, y), every=2, batch_size=4, tol=1e-4)
    else:
        optimizer = getattr(torch.optim, name)(model.parameters(), **options)
        monitor = stableopt.StabilityMonitor(
            optimizer, model, MSE, (x, y), every=2, batch_size=4, tol=1e-4, quantities=MONITORED
        )
    records: list[dict[str, float]] = []
    for _ in range(6):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = MSE(model(x), y)
            loss.backward()
            return loss

        with Counting() as transfers:
            optimizer.step(closure)
        if monitor.margins is not None:
            records.append(_numbers(monitor.margins.record()))
    found = monitor.margins.measurements
    searches = ("sharpness", "preconditioned_sharpness")
    passes = monitor.margins["critical_sharpness"].details["passes"] if name == "AdamW" else 0
    return {
        "records": records,
        "weights": [p.detach().cpu() for p in model.parameters()],
        "products": sum(found[kind].products for kind in searches if kind in found),
        "passes": passes,
        "reads": transfers.to_host,
    }


EACH = ("Adadelta", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Muon")
"""Other optimizers whose step is read; Muon, which takes matrices alone, with AdamW for the others."""


def by_each(device: str) -> list[dict[str, tuple[dict[str, float], int]]]:
    """Return each optimizer's second measurement, and its reads but for products.

    On the device once more with twice the layers, for two whose radii and blocks are checked.
    """
    deeper = {} if device == "cpu" else _by(EACH[-2:], device, hidden=8)
    return [_by(EACH, device, hidden=4), deeper]


def _by(
    names: Sequence[str], device: str, *, hidden: int
) -> dict[str, tuple[dict[str, float], int]]:
    model, (x, y) = network(device, hidden, width=2), samples(device)
    problem, found = Problem(model, MSE, (x, y)), {}
    for name in names:
        held = [p for p in model.parameters() if p.dim() == 2 or name != "Muon"]
        if not hasattr(torch.optim, name):
            continue
        several = [getattr(torch.optim, name)(held, lr=0.001)]
        if name == "Muon":
            biases = [p for p in model.parameters() if p.dim() != 2]
            several.append(torch.optim.AdamW(biases, lr=0.001))
        monitor = stableopt.StabilityMonitor(several, problem, every=1, batch_size=4, tol=1e-3)
        with monitor:
            for _ in range(2):
                model.zero_grad()
                MSE(model(x), y).backward()
                with Counting() as transfers:
                    for optimizer in several:
                        optimizer.step()
        assert monitor.margins is not None
        assert monitor.margins.failure is None
        reads = transfers.to_host - transfers.places_in("eigen/inner_product.py")
        found[name] = _numbers(monitor.margins.record()), reads
    return found


def searched(device: str, line_search: str | None) -> tuple[int, int, int]:
    """Return iterations, calls of the closure, and reads of the host of a step of L-BFGS."""
    model, (x, y) = network(device), samples(device)
    optimizer = stableopt.LBFGS(model.parameters(), max_iter=8, line_search_fn=line_search)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = MSE(model(x), y)
        loss.backward()
        return loss

    with Counting() as transfers:
        optimizer.step(closure)
    iterations = optimizer.state[optimizer.param_groups[0]["params"][0]]["n_iter"]
    return iterations, len(calls), transfers.to_host


def from_a_loader(device: str) -> dict[str, float]:
    """Measure a model on the device, with its data in a loader on the CPU and in chunks."""
    ragged = DataLoader(TensorDataset(*samples("cpu", 13)), batch_size=5)  # 5, 5 and 3 samples
    asked: dict[str, Any] = {"lr": 0.1, "quantities": ("sharpness", "non_uniformity"), "tol": 1e-5}
    return _numbers(
        stableopt.measure(network(device, width=2), MSE, ragged, chunk_size=4, **asked).record()
    )


def suggested(device: str) -> list[tuple[str, int, float]]:
    found = stableopt.suggest(network(device, width=2), MSE, samples(device), batch_sizes=(1, 4))
    return [(row.optimizer, row.batch_size, row.lr) for row in found.rows]


def steered(device: str) -> tuple[list[float], dict[str, float]]:
    """Return the learning rates of a run that a scheduler steers, and the last record."""
    model, (x, y) = network(device), samples(device)
    optimizer = stableopt.SGD(model.parameters(), lr=0.05)
    monitor = optimizer.track(model, MSE, (x, y), every=1, batch_size=12, tol=1e-4)
    scheduler = stableopt.StabilityLR(
        optimizer, monitor, stableopt.TargetRegion(sharpness=(0, 0.5)), loss_cap=10.0
    )
    rates = []
    for _ in range(5):
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates, _numbers(monitor.margins.record())


def recorded(device: str, folder: str) -> tuple[list[Any], list[int]]:
    """Return what a flight recorder keeps of each step, and its reads in each step and at the end."""
    model, (x, y) = network(device), samples(device)
    rate = torch.tensor(0.5).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=False)
    monitor = stableopt.StabilityMonitor(optimizer, model, MSE, (x, y), every=100, batch_size=4)
    recorder = stableopt.FlightRecorder(monitor, folder, check_every=100)
    rows, reads = torch.arange(4).to(device), []
    for step in range(3):
        optimizer.zero_grad()
        loss = MSE(model(x[rows]), y[rows])
        loss.backward()
        with Counting() as transfers:
            recorder.loss(loss, rows)
            recorder.loss(loss, rows[step], grad_norm=loss)
            optimizer.step()
        reads.append(transfers.places_in("recorder/"))
        with torch.no_grad():
            rows += 1
            optimizer.param_groups[0]["lr"].mul_(0.5)
    with Counting() as transfers:
        recorder.close()
    reads.append(transfers.places_in("recorder/"))
    kept = [(s.lr, s.batch, s.loss, s.total_norm) for s in recorder.evidence.steps]
    return kept, reads


MOMENTUM = {"SGD": {"momentum": 0.9}, "AdamW": {}, "LBFGS": {"max_iter": 3}}


def resumed(device: str, name: str) -> dict[str, Any]:
    """Return what three steps end with; the second is on the CPU."""
    return _moved(name, [device, "cpu", device])


def _moved(name: str, places: list[str]) -> dict[str, Any]:
    """Take a step in each place, with a checkpoint from one to the next."""
    file = io.BytesIO()
    for place in places:
        model, (x, y) = network(place), samples(place)
        family = torch.optim if name == "AdamW" else stableopt
        optimizer = getattr(family, name)(model.parameters(), lr=0.1, **MOMENTUM[name])
        monitor = stableopt.StabilityMonitor(
            optimizer, model, MSE, (x, y), every=1, batch_size=12, tol=1e-4
        )
        parts = (model, optimizer, monitor)
        if file.tell():
            file.seek(0)
            for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
                part.load_state_dict(state)

        def closure(optimizer: Any = optimizer, at: Any = (model, x, y)) -> Tensor:
            optimizer.zero_grad()
            loss = MSE(at[0](at[1]), at[2])
            loss.backward()
            return loss

        optimizer.step(closure)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        assert all(p.device.type == place for p in model.parameters())
    return {
        "record": _numbers(monitor.margins.record()),
        "weights": [p.detach().cpu() for p in model.parameters()],
    }


def reading(device: str) -> dict[str, tuple[int, int]]:
    """Return the transfers to host and device that ways to read and write a tensor make."""
    two = torch.ones(2, device=device)
    host = torch.ones(2)
    ways: dict[str, Any] = {
        "item": lambda: two[0].item(),
        "float": lambda: float(two.sum()),
        "bool": lambda: bool((two > 0).all()),
        "tolist": two.tolist,
        "cpu": two.cpu,
        "copy": lambda: host.copy_(two),
        "none": lambda: (two @ two).add_(1).sqrt().unsqueeze_(0).view(-1),
        "send": lambda: host.to(device),
    }
    counted = {}
    for way, read in ways.items():
        with Counting() as transfers:
            read()
        counted[way] = (transfers.to_host, transfers.to_device)
    return counted


def mixing(device: str) -> str:
    try:
        torch.ones(2, device=device) + torch.ones(2)
    except RuntimeError as error:
        return str(error)
    return ""
