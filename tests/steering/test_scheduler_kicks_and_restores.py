"""`StabilityLR` kicks the weights at an unstable point, and restores them after a divergence."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from steered_runs import FLAT, MSE, Run, X, Y, network
from torch import Tensor, nn

import stableopt
from stableopt import StabilityLR, StabilityMonitor, TargetRegion
from stableopt.steering.decision import Decision
from stableopt.steering.law_state import State
from stableopt.steering.lr_laws import Law, LRMeasured
from stableopt.steering.rollback import LastGood


def test_it_goes_back_to_the_last_good_weights_only_if_asked() -> None:
    """Catches weights restored without ``restore=True``, and momentum that is not restored with them."""
    for restore in (False, True):
        run = Run(momentum=0.9)
        scheduler = StabilityLR(run.optimizer, run.monitor, FLAT, restore=restore)
        run.go(scheduler, 3)
        good = run.weights()
        momentum = copy.deepcopy(run.optimizer.state_dict()["state"])
        with pytest.warns(RuntimeWarning, match="not finite"):
            run.go(scheduler, 1, Y * math.nan)
        if not restore:
            assert not run.weights()[0].isfinite().any()
            continue
        assert all(map(torch.equal, run.weights(), good))
        after = run.optimizer.state_dict()["state"]
        assert all(
            torch.equal(momentum[k]["momentum_buffer"], after[k]["momentum_buffer"])
            for k in momentum
        )
        assert [d.kind for d in scheduler.decisions][-2:] == ["cut", "restore"]
        run.step()
        assert run.monitor.margins.converged


def test_each_divergence_after_a_restore_is_cut_and_restored() -> None:
    """Catches a law that treats restored weights as lost, so that a second divergence is final."""
    run = Run(momentum=0.9)
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT)
    run.go(scheduler, 3)
    good = run.weights()
    with pytest.warns(RuntimeWarning, match="not finite"):
        run.go(scheduler, 4, Y * math.nan)
    kinds = [decision.kind for decision in scheduler.decisions]
    assert kinds[-8:] == ["cut", "restore"] * 4
    assert all(map(torch.equal, run.weights(), good))
    assert run.rates()[0] == pytest.approx(0.7**4 * 0.05 * 1.01**3)


def test_parameters_that_join_after_the_snapshot_lose_their_momentum() -> None:
    """Catches a momentum of infinity that outlives the restore, and cuts for good after it."""
    run = Run(momentum=0.9)
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT)
    run.go(scheduler, 2)
    joined = nn.Parameter(torch.zeros(1))
    run.optimizer.add_param_group({"params": [joined]})
    run.optimizer.state[joined]["momentum_buffer"] = torch.tensor([math.inf])
    with pytest.warns(RuntimeWarning, match="not finite"):
        run.go(scheduler, 1, Y * math.nan)
    assert joined not in run.optimizer.state
    assert all(bool(p.isfinite().all()) for p in run.weights())


def test_a_snapshot_holds_what_an_optimizer_writes_into_its_groups() -> None:
    """Catches Prodigy's estimates that stay NaN, which ends its adaptation, and settings undone that a
    schedule or the user has changed.
    """
    prodigy = pytest.importorskip("prodigyopt", reason="needs prodigyopt").Prodigy
    model = network()
    optimizer = prodigy(model.parameters(), lr=1.0)
    good = LastGood(optimizer, model)

    def step(y: Tensor) -> None:
        optimizer.zero_grad()
        MSE(model(X), y).backward()
        optimizer.step()

    step(Y)
    good.keep()
    before = dict(optimizer.param_groups[0])
    step(Y * math.nan)
    assert math.isnan(optimizer.param_groups[0]["d_numerator"])
    settings = {"lr": 0.5, "weight_decay": 0.1, "eps": 1e-6, "d_coef": 2.0}
    optimizer.param_groups[0].update(settings)
    good.put_back()
    assert optimizer.param_groups[0] == {**before, **settings}


def test_unmeasured_weights_are_restored_once() -> None:
    """Catches a run that was saved in a spike of the loss, and goes back to it after every cut."""
    run = Run(momentum=0.9)
    target = TargetRegion(sharpness=(0, 40.0))
    scheduler = StabilityLR(run.optimizer, run.monitor, target, loss_cap=1.0)
    scheduler.load_state_dict(scheduler.state_dict())
    with torch.no_grad():
        run.model[2].bias.add_(8.0)
    run.go(scheduler, 4)
    kinds = [decision.kind for decision in scheduler.decisions]
    assert kinds == ["cut", "restore", "cut", "hold", "hold"]
    assert run.monitor.margins is not None
    assert run.monitor.margins.loss < 1.0


@pytest.mark.parametrize("finite", [True, False])
def test_a_resumed_run_restores_the_weights_of_its_first_step(finite: bool) -> None:
    """Catches a run without weights to go back to until its first measurement, which the run that was
    not interrupted has; and weights kept that are lost already.
    """
    first = Run(momentum=0.9, every=5)
    scheduler = StabilityLR(first.optimizer, first.monitor, FLAT)
    first.go(scheduler, 6)
    parts = first.model, first.optimizer, first.monitor, scheduler
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    second = Run(momentum=0.9, every=5)
    resumed = StabilityLR(second.optimizer, second.monitor, FLAT)
    # The scheduler first: the weights at hand are not those of the checkpoint yet.
    for part, state in reversed(
        list(zip((second.model, second.optimizer, second.monitor, resumed), saved, strict=True))
    ):
        part.load_state_dict(state)
    second.go(resumed, 1, Y if finite else Y * math.nan)
    kept = second.weights()
    with pytest.warns(RuntimeWarning, match="not finite"):
        second.go(resumed, 3, Y * math.nan)
    kinds = [decision.kind for decision in resumed.decisions]
    assert kinds[-2:] == (["cut", "restore"] if finite else [kinds[-2], "cut"])
    assert all(map(torch.equal, second.weights(), kept)) == finite


@pytest.mark.parametrize(
    ("momentum", "restore", "keeps"), [(0.0, None, False), (0.9, None, True), (0.9, False, False)]
)
def test_weights_are_kept_where_momentum_needs_it(
    momentum: float, restore: bool | None, keeps: bool
) -> None:
    """Catches a default that does not restore with momentum, or that copies weights without it.

    Momentum carries the weights on after a cut. Plain gradient descent needs no copy of them.
    """
    run = Run(momentum=momentum)
    options = {} if restore is None else {"restore": restore}
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT, **options)
    run.go(scheduler, 1)
    with pytest.warns(RuntimeWarning, match="not finite"):
        run.go(scheduler, 1, Y * math.nan)
    assert bool(run.weights()[0].isfinite().all()) == keeps


def test_a_kick_is_along_the_direction_of_the_optimizers_own_limit() -> None:
    """Catches a kick along the loss's top eigenvector, where the rates make another direction unstable.

    f = (10 (a - 1)^2 + (b - 1)^2) / 2, whose Hessian has its top eigenvector along a.
    """
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    model = nn.ParameterList([a, b])
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.01}, {"params": [b], "lr": 2.1}])

    def loss(model: nn.ParameterList, batch: Tensor) -> Tensor:
        return (10 * (model[0] - 1) ** 2 + (model[1] - 1) ** 2).mean() / 2 + 0 * batch.mean()

    problem = stableopt.Problem.from_batch_loss(model, loss, torch.zeros(4, 1))
    monitor = StabilityMonitor(optimizer, problem, every=1, batch_size=4)
    scheduler = StabilityLR(optimizer, monitor, TargetRegion(sharpness=(0, 0.9)), kick=0.01)
    loss(model, torch.zeros(4, 1)).backward()
    optimizer.step()
    scheduler.step()
    assert "kick" in [decision.kind for decision in scheduler.decisions]
    assert float(a.detach()) == pytest.approx(1.0, abs=1e-6)
    assert abs(float(b.detach()) - 1) == pytest.approx(0.01 * math.sqrt(2), rel=1e-3)
    monitor.close()


def stateless(measured: LRMeasured, state: State) -> tuple[Decision, State]:
    """Go to the largest rate, and remember nothing."""
    return measured.decide("raise", measured.max_lr, "at once"), {}


@pytest.mark.parametrize("law", [None, stateless])
def test_a_kick_is_once_along_the_top_eigenvector_when_the_point_becomes_unstable(
    law: Law | None,
) -> None:
    """Catches a kick at a stable point, at every measurement, or along a flat direction.

    The loss is quadratic, so nothing else moves the weights at its minimum. Whether the weights were
    kicked is not a part of the law's state.
    """
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1)  # curvatures 1 and 9
    with torch.no_grad():
        model.weight[0, 0] = 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=2 / 9 / 1.005)
    monitor = StabilityMonitor(optimizer, model, MSE, (x, y), every=1, batch_size=2)
    scheduler = StabilityLR(
        optimizer, monitor, TargetRegion(sharpness=(0, 1.0)), law=law, kick=1e-2, max_lr=0.226
    )
    kicks, norms = [], []
    for _ in range(3):
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()
        before = model.weight.detach().clone()
        scheduler.step()
        kicks.append((model.weight.detach() - before).flatten())
        norms.append(float(before.norm()))
    assert kicks[0].abs()[1] == pytest.approx(1e-2 * norms[0], rel=0.01)
    assert kicks[0].abs()[0] < 0.05 * kicks[0].abs()[1]  # the eigenvector's tolerance is 3 %
    assert torch.equal(kicks[1], torch.zeros(2))
    assert torch.equal(kicks[2], torch.zeros(2))
    assert [d.kind for d in scheduler.decisions].count("kick") == 1
    monitor.close()
