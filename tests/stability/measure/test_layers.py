"""What is measured of layers, against dense blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import covariance, small_data, small_network
from rank_processes import NEEDS_FSDP_ON_CPU, run
from rank_workers.fully_sharded import wide_network
from rank_workers.layers import layers_of_ranks, measured
from rank_workers.shares import SAMPLES
from torch import Tensor, nn
from torch.func import functional_call

from stableopt import StabilityMargins, StabilityMonitor, UpdateRule, measure
from stableopt.curvature import Hessian, Problem
from stableopt.stability import DiagonalPreconditioner, MatrixPreconditioner

X, Y = small_data()
MSE = nn.MSELoss()

# Required accuracy. Residuals of 1e-10 leave errors in eigenvectors of that size over the gap.
BAR = 1e-8
EXACT: dict[str, Any] = {"tol": 1e-10, "max_iter": 200}


class Tied(nn.Module):
    """A weight that two layers share, one that is frozen, and one of the root module itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.full((3,), 0.7))
        self.encoder, self.body, self.decoder = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight
        self.body.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(torch.tanh(self.encoder(x))))
        return self.scale * self.decoder(hidden)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def dense(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the Hessian of the mean loss in the trainable parameters."""
    params = trainable(model)
    sizes = [p.numel() for p in params.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(params.items(), flat.split(sizes), strict=True)  # type: ignore[no-untyped-call]
        state = {name: part.view_as(p) for (name, p), part in parts}
        return MSE(functional_call(model, state, (x,)), y)

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    return torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-untyped-call]


def indices(model: nn.Module, *prefixes: str) -> Tensor:
    """Return the places of the parameters whose names begin with one of ``prefixes``."""
    spans, start = [], 0
    for name, p in trainable(model).items():
        if name.startswith(prefixes):
            spans.append(torch.arange(start, start + p.numel()))
        start += p.numel()
    return torch.cat(spans)


def top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).real.max())


def stepped(model: nn.Module, make: Callable[[nn.Module], Any]) -> Any:
    optimizer = make(model)
    for _ in range(2):
        optimizer.zero_grad()
        MSE(model(X), Y).backward()
        optimizer.step()
    return optimizer


def of_groups(model: Any) -> torch.optim.Optimizer:
    head = [model.decoder.bias, model.scale]
    body = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in head)]
    groups = [{"params": body, "weight_decay": 0.3}, {"params": head, "lr": 0.03}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.5)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(trainable(model).values(), lr=0.1),
    "groups": of_groups,
    "AdamW": lambda model: torch.optim.AdamW(trainable(model).values(), lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_blocks_agree_with_dense_ones(name: str) -> None:
    """Catches a block's preconditioner or decay of other parameters, and a tied or frozen weight.

    The oracle is the principal block of the dense P^1/2 (H + Lambda) P^1/2.
    """
    model = Tied().double()
    optimizer = stepped(model, OPTIMIZERS[name])
    margins = measure(model, MSE, (X, Y), optimizer=optimizer, quantities=("layers",), **EXACT)
    rule = UpdateRule.from_optimizer(optimizer)
    scale, decay = torch.ones(len(dense(model, X, Y)), dtype=torch.float64), 0.0
    if name == "AdamW":
        assert rule.preconditioner is not None
        preconditioner = rule.preconditioner.over(list(trainable(model).values()))
        scale = (preconditioner @ torch.ones_like(scale)).sqrt()
    elif name == "groups":
        scale[indices(model, "decoder.bias", "scale")] = 0.3**0.5
        decay = torch.diag(torch.full_like(scale, 0.3))
        decay[indices(model, "decoder.bias", "scale")] = 0.0
    plain = dense(model, X, Y)
    mean = scale[:, None] * (plain + decay) * scale
    vector = torch.linalg.eigh(mean)[1][:, -1]

    layers = margins.layers
    assert layers is not None
    assert layers.names == ("scale", "encoder", "body", "decoder")
    assert layers.parameters == (3, 12, 9, 3)
    assert margins["layers"].ratio == max(layers.column("ratio"))  # type: ignore[type-var]
    for layer in layers:
        index = indices(model, layer.name)
        assert layer.converged
        assert layer.sharpness == pytest.approx(top(mean[index][:, index]), rel=BAR)
        assert layer.limit == pytest.approx(rule.max_sharpness)
        assert layer.share == pytest.approx(float(vector[index].square().sum()), abs=BAR)
        assert layer.non_uniformity is None
        # Four standard errors; with 16 probes the standard error itself is off by a fifth.
        expected, error = float(plain.diagonal()[index].mean()), layer.mean_curvature_error
        assert error is not None
        assert layer.mean_curvature == pytest.approx(expected, abs=4 * error + 1e-12)
    assert sum(layers.column("share")) == pytest.approx(1.0, abs=1e-12)  # type: ignore[arg-type]
    assert layers.rest == 0.0


def test_the_non_uniformity_of_blocks() -> None:
    """Catches the block of Sigma for the Sigma of blocks, P left out, and a frozen bias.

    The oracle is the covariance of the samples' dense blocks. Tied weights have no structured products.
    """
    model = small_network()
    model[0].bias.requires_grad_(False)
    optimizer = stepped(model, OPTIMIZERS["AdamW"])
    margins = measure(
        model,
        MSE,
        (X, Y),
        optimizer=optimizer,
        batch_size=1,
        quantities=("layers", "non_uniformity"),
        blocks=["0", "2", "2.weight"],
        **EXACT,
    )
    P = UpdateRule.from_optimizer(optimizer).preconditioner
    assert P is not None
    root = (P @ torch.ones(33, dtype=torch.float64)).sqrt()
    hessians = torch.stack([dense(model, X[i : i + 1], Y[i : i + 1]) for i in range(len(X))])
    hessians = root[:, None] * hessians * root
    for layer in margins.layers or ():
        index = indices(model, layer.name)
        spread = covariance(hessians[:, index][:, :, index])
        assert layer.non_uniformity == pytest.approx(top(spread) ** 0.5, rel=BAR)
        assert layer.non_uniformity_limit == margins.non_uniformity_limit


def test_a_preconditioner_that_is_not_diagonal() -> None:
    """Catches the inverse or the root of the whole P where its principal block is due."""
    model = small_network()
    generator = torch.Generator().manual_seed(3)
    roots = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (20, 18)]
    P = torch.block_diag(*[root @ root.T + torch.eye(len(root)) for root in roots])
    rule = UpdateRule(lr=0.1, preconditioner=MatrixPreconditioner(model.parameters(), P))
    margins = measure(model, MSE, (X, Y), update_rule=rule, quantities=("layers",), **EXACT)
    H = dense(model, X, Y)
    values, basis = torch.linalg.eigh(P)
    root = basis * values.sqrt() @ basis.T
    vector = torch.linalg.eigh(root @ H @ root)[1][:, -1]
    gradient = Problem(model, MSE, (X, Y)).gradient()
    layers = margins.layers
    assert layers is not None
    for layer, index in zip(layers, (slice(0, 20), slice(20, 38)), strict=True):
        assert layer.sharpness == pytest.approx(top(P[index, index] @ H[index, index]), rel=BAR)
        assert layer.share is None  # the matrix may have entries between parameters
    scaled_gradient = root @ gradient
    expected = float((vector @ scaled_gradient) ** 2 / (scaled_gradient @ scaled_gradient))
    details = margins["preconditioned_sharpness"].details
    assert details["gradient_share"] == pytest.approx(expected, rel=1e-6)
    assert "step_share" not in details


def test_traces_of_a_diagonal_hessian_are_exact() -> None:
    """Catches probes that are not of length one in each entry, and traces of the wrong block."""
    model = nn.Linear(3, 2).double()
    x = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    data = (x, torch.zeros(3, 2, dtype=torch.float64))
    model.bias.requires_grad_(False)
    margins = measure(model, MSE, data, lr=0.1, quantities=("layers",), blocks="weight")
    (layer,) = margins.layers or ()
    assert layer.mean_curvature == pytest.approx((1 + 4 + 16) / 9, rel=1e-12)
    assert layer.mean_curvature_error == pytest.approx(0.0, abs=1e-12)


def test_several_optimizers_have_limits_of_their_own() -> None:
    """Catches one optimizer's limit for another's layer, and a limit where two share one."""
    model = small_network()
    model.append(nn.Linear(3, 3).double())
    slow = torch.optim.SGD([*model[0].parameters(), model[2].weight], lr=0.1, momentum=0.5)
    fast = torch.optim.Adam([model[2].bias, *model[3].parameters()], lr=0.01)
    for optimizer in (slow, fast):
        stepped(model, lambda _, optimizer=optimizer: optimizer)
    with pytest.warns(RuntimeWarning, match="momenta differ"):
        margins = measure(
            model, MSE, (X, Y), optimizer=[slow, fast], quantities=("layers",), **EXACT
        )
    H, layers = dense(model, X, Y), margins.layers
    assert layers is not None
    adam = UpdateRule.from_optimizer(fast)
    assert adam.preconditioner is not None
    P = adam.preconditioner.over(list(model[3].parameters())) @ torch.ones(12).double()
    last = indices(model, "3")
    preconditioned = P.sqrt()[:, None] * H[last][:, last] * P.sqrt()
    first, middle = indices(model, "0"), indices(model, "2")
    expected = [
        (top(H[first][:, first]), UpdateRule.from_optimizer(slow).max_sharpness),
        (top(H[middle][:, middle]), None),
        (top(preconditioned), adam.max_sharpness),
    ]
    for layer, (value, limit) in zip(layers, expected, strict=True):
        assert layer.sharpness == pytest.approx(value, rel=BAR)
        assert layer.limit == limit


def trained(quantities: tuple[str, ...], **options: Any) -> StabilityMonitor:
    model = wide_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    monitor = StabilityMonitor(
        optimizer, model, MSE, (X, Y), every=1, quantities=quantities, tol=1e-3, **options
    )
    stepped(model, lambda _: optimizer)
    return monitor


def test_the_free_part_is_that_of_the_tracked_directions() -> None:
    """Catches the gradient before the step, a step in other coordinates, and the explorer's share."""
    monitor = trained(("sharpness", "realised_edge"))
    margins, model = monitor.margins, monitor.problem.model
    assert margins is not None
    optimizer = monitor.optimizer
    problem = Problem(model, MSE, (X, Y))
    current = [p.detach().clone() for p in model.parameters()]
    expected = {"sharpness": torch.ones(problem.num_params, dtype=torch.float64)}
    P = UpdateRule.from_optimizer(optimizer).preconditioner
    assert P is not None
    expected["preconditioned_sharpness"] = (P @ expected["sharpness"]).sqrt()
    # A twin takes the first of the two steps: it has the parameters before the last.
    twin = wide_network()
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    MSE(twin(X), Y).backward()
    twin_optimizer.step()
    pairs = zip(current, twin.parameters(), strict=True)
    change = torch.cat([(a - b.detach()).reshape(-1) for a, b in pairs])
    for name, root in expected.items():
        rows = monitor._measurer.starts[name][:-1]
        gradient, step = root * problem.gradient(), change / root
        details = margins[name].details
        for key, vector in (("gradient_share", gradient), ("step_share", step)):
            share = float((rows @ vector).square().sum() / vector.square().sum())
            assert details[key] == pytest.approx(share, rel=1e-6)
        shares = margins[name].layers
        assert shares is not None
        assert sum(shares.column("share")) == pytest.approx(1.0, abs=1e-12)  # type: ignore[arg-type]
    assert margins.layers is margins["preconditioned_sharpness"].layers
    assert (
        margins.record()["sharpness_gradient_share"]
        == margins["sharpness"].details["gradient_share"]
    )


def test_the_free_part_takes_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gradient or a Hessian-vector product of its own."""
    passes = []
    loss_and_gradient = Problem.loss_and_gradient
    monkeypatch.setattr(
        Problem, "loss_and_gradient", lambda *a, **k: passes.append(1) or loss_and_gradient(*a, **k)
    )
    product = Hessian.products
    counted = []
    monkeypatch.setattr(
        Hessian, "products", lambda self, v: counted.append(len(v)) or product(self, v)
    )
    margins = measure(small_network(), MSE, (X, Y), lr=0.1)
    measurement = margins["sharpness"].measurement
    assert measurement is not None
    assert (sum(counted), passes) == (measurement.products, [])
    assert "gradient_share" in margins["sharpness"].details


def test_a_monitor_follows_each_layer() -> None:
    """Catches searches from scratch at each measurement, and rows of one layer in another's."""
    monitor = trained(("layers",), blocks=["0", "2"], cold_every=20)
    first, second = (m["layers"].measurement for m in monitor.history)
    assert first is not None
    assert second is not None
    assert second.products < first.products - 10
    assert monitor._measurer.starts["layers"].shape[1] == monitor.problem.num_params
    state = monitor.state_dict()
    restored = trained(("layers",), blocks=["0", "2"])
    restored.load_state_dict(state)
    assert restored.margins == monitor.margins


def test_overlapping_blocks_and_a_rest() -> None:
    """Catches overlaps that share warm starts, and a share of what is in no block."""
    monitor = trained(("layers",), blocks={"all": "*", "bias": "0.bias"})
    margins = monitor.margins
    assert margins is not None
    layers = margins.layers
    assert layers is not None
    assert layers["all"].share == pytest.approx(1.0)
    assert layers["all"].sharpness == pytest.approx(margins.preconditioned_sharpness, rel=1e-3)
    assert "layers" not in monitor._measurer.starts
    shares = measure(small_network(), MSE, (X, Y), lr=0.1, blocks="0.*").layers
    assert shares is not None
    assert shares.names == ("0.weight", "0.bias")
    assert shares.rest == pytest.approx(1 - sum(shares.column("share")))  # type: ignore[arg-type]


def test_blocks_follow_layers_that_freeze() -> None:
    """Catches a measurement that fails because a named layer is trained no longer."""
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = StabilityMonitor(optimizer, model, MSE, (X, Y), every=1, blocks=[model[0], "2"])
    stepped(model, lambda _: optimizer)
    model[0].requires_grad_(False)
    stepped(model, lambda _: optimizer)
    names = [margins.layers.names for margins in monitor.history if margins.layers]
    assert names == [("0", "2")] * 2 + [("2",)] * 2


def test_without_second_derivatives() -> None:
    """Catches an exact block product where the model has only first derivatives."""
    model = small_network()
    problem = Problem(model, MSE, (X, Y))
    margins = measure(problem, lr=0.1, quantities=("layers",))

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.tanh())
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            (out,) = ctx.saved_tensors
            return slope * (1 - out**2)

    class Activation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    model[1] = Activation()
    by_differences: StabilityMargins = measure(model, MSE, (X, Y), lr=0.1, quantities=("layers",))
    assert "differences" in (by_differences.method or "")
    assert "gradient_share" not in by_differences["sharpness"].details
    for exact, difference in zip(margins.layers or (), by_differences.layers or (), strict=True):
        # Errors of the differences.
        assert difference.sharpness == pytest.approx(exact.sharpness, rel=1e-5)
        assert difference.mean_curvature == pytest.approx(exact.mean_curvature, rel=1e-4)


@NEEDS_FSDP_ON_CPU
def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    """Catches shares, traces and blocks of one rank's shard or of one rank's samples."""
    first_rank, second_rank = run(layers_of_ranks, 2, tmp_path)
    single_process = measured(wide_network(), small_data(SAMPLES))
    assert first_rank == second_rank
    for strategy, accuracy in (("DDP", 1e-8), ("FSDP", 1e-4)):  # FSDP takes differences
        for name in ("share", "sharpness"):
            expected = single_process["columns"][name]
            assert first_rank[strategy]["columns"][name] == pytest.approx(
                expected, rel=accuracy, abs=1e-7
            )
        assert first_rank[strategy]["parameters"] == single_process["parameters"]
    assert first_rank["DDP"]["columns"]["mean_curvature"] == pytest.approx(
        single_process["columns"]["mean_curvature"], rel=1e-8
    )
    # Each rank draws its own part of the probes: the oracle is the dense diagonal.
    diagonal = dense(wide_network(), *small_data(SAMPLES)).diagonal()
    blocks = diagonal.split([28, 40, 10, 18])  # type: ignore[no-untyped-call]
    columns = first_rank["FSDP"]["columns"]
    pairs = zip(blocks, columns["mean_curvature"], columns["mean_curvature_error"], strict=True)
    for block, mean, error in pairs:
        assert mean == pytest.approx(float(block.mean()), abs=4 * error)


def test_a_matrix_between_layers_leaves_no_shares() -> None:
    """Catches shares that are negative: products of an eigenvector and its dual, as under L-BFGS."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for matrix, has_shares in (
        (MatrixPreconditioner(params, drawn @ drawn.T), False),
        (DiagonalPreconditioner(params, [1.0, 2.0, 3.0, 4.0]), True),
    ):
        rule = UpdateRule(lr=0.1, preconditioner=matrix)
        margins = measure(model, nn.MSELoss(), (x, x[:, :1]), update_rule=rule)
        assert (margins["preconditioned_sharpness"].layers is not None) is has_shares
        assert margins["preconditioned_sharpness"].details["gradient_share"] >= 0
        assert (margins.layers is not None) is has_shares
        assert all(layer.share >= 0 for layer in margins.layers or ())
