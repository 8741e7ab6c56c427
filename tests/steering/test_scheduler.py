"""`StabilityLR` acts once per measurement, composes with torch's schedulers, and reports decisions."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from steered_runs import FLAT, MSE, Run, X, Y, network
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LinearLR, SequentialLR

from stableopt import StabilityController, StabilityLR, StabilityMonitor, TargetRegion
from stableopt.steering.law_state import State
from stableopt.steering.lr_laws import LRMeasured


def test_it_acts_once_for_each_fresh_measurement() -> None:
    """Catches a rate that goes on moving by an old measurement."""
    run = Run(every=5)
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT)
    rates = []
    for _ in range(20):
        run.go(scheduler)
        scheduler.step()  # a second call finds nothing fresh
        rates.append(run.rates()[0])
    changed = [step for step in range(1, 20) if rates[step] != rates[step - 1]]
    assert changed == [4, 9, 14, 19]  # after steps 5, 10, 15 and 20
    assert rates[4] == pytest.approx(0.05 * 1.01, rel=1e-12)
    assert rates[9] == pytest.approx(rates[4] * 1.01**5, rel=1e-12)
    assert scheduler.get_last_lr() == [rates[-1]]
    assert scheduler.last_epoch == 40


def test_a_monitor_without_measurements_changes_nothing() -> None:
    """Catches a scheduler that acts in its constructor, or fails before the first measurement."""
    run = Run(every=1000)
    run.monitor.measure()
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT)
    assert run.rates() == [0.05]
    run.step()
    scheduler.step()
    assert run.rates() != [0.05]  # the measurement before is fresh for it
    run.monitor.close()
    with pytest.warns(RuntimeWarning, match="the monitor is closed"):
        run.go(scheduler, 3)
    assert len(scheduler.decisions) == 1


def test_groups_keep_their_ratios_and_zero_stays_zero() -> None:
    """Catches one rate for all groups."""
    run = Run(groups=(0.04, 0.01))
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT)
    run.go(scheduler, 12)
    fast, slow = run.rates()
    assert fast == pytest.approx(0.04 * 1.01**12, rel=1e-12)
    assert fast / slow == pytest.approx(4, rel=1e-12)
    frozen = Run(groups=(0.04, 0.0))
    scheduler = StabilityLR(frozen.optimizer, frozen.monitor, FLAT)
    frozen.go(scheduler, 3)
    assert frozen.rates()[0] > 0.04
    assert frozen.rates()[1] == 0.0


def test_an_adaptive_optimizer_goes_by_its_preconditioned_sharpness() -> None:
    """Catches the plain sharpness compared with the limit of the preconditioned one."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(32, 3), torch.randn(32, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = StabilityMonitor(optimizer, model, nn.MSELoss(), (x, y), every=1, tol=1e-6)
    scheduler = StabilityLR(optimizer, monitor, TargetRegion(sharpness=(0, 1.0)))
    nn.MSELoss()(model(x), y).backward()
    optimizer.step()
    scheduler.step()
    assert monitor.margins is not None
    (decision,) = scheduler.decisions
    assert decision.measured == monitor.margins.preconditioned_sharpness
    assert decision.measured > 2 * monitor.margins.sharpness
    assert decision.limit == monitor.margins.preconditioned_sharpness_limit


@pytest.mark.filterwarnings("ignore:limits are not known:RuntimeWarning")
def test_an_optimizer_without_a_limit_is_refused_at_once() -> None:
    """Catches an error at the first measurement, in the middle of training."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.Rprop(model.parameters())
    monitor = StabilityMonitor(
        optimizer, model, nn.MSELoss(), (torch.ones(4, 3), torch.ones(4, 2)), every=1
    )
    for make in (
        lambda: StabilityLR(optimizer, monitor, FLAT),
        lambda: StabilityController(monitor, FLAT),
    ):
        with pytest.raises(
            ValueError, match="optimizer: the sharpness has no limit with it: Rprop"
        ):
            make()


@pytest.mark.filterwarnings("ignore:limits are not known:RuntimeWarning")
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_a_limit_that_is_unknown_for_now_is_waited_for(rate: float) -> None:
    """Catches a refusal of Adafactor after ``zero_grad``, and an error after a step of its own size."""
    run = Run()
    optimizer = torch.optim.Adafactor(run.model.parameters(), lr=rate)
    MSE(run.model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()  # as in a resumed run
    monitor = StabilityMonitor(optimizer, run.model, MSE, (X, Y), every=1)
    scheduler = StabilityLR(optimizer, monitor, FLAT)
    controller = StabilityController(monitor, FLAT, lr=scheduler)
    MSE(run.model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    controller.step()
    (decision,) = scheduler.decisions
    assert decision.kind == "hold"
    assert decision.why.startswith("the limit is not known: ")


def test_tensor_rates_are_changed_in_place() -> None:
    """Catches a new tensor for the rate: a compiled step or a captured graph would keep the old one."""
    rate = torch.tensor(0.05)
    run = Run(lr=rate)
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT)
    run.step()
    scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.0505, rel=1e-6)  # float32
    last = scheduler.get_last_lr()[0]
    assert isinstance(last, Tensor)
    if torch.__version__ >= "2.7":  # before, torch's own schedulers gave the rate itself
        assert last is not rate


def test_after_a_warm_up() -> None:
    """Catches a constructor that changes the rate, and a fall to the initial rate after the warm-up."""
    run = Run(lr=0.1)
    warm_up = LinearLR(run.optimizer, start_factor=0.1, total_iters=5)
    steering = StabilityLR(run.optimizer, run.monitor, FLAT)
    scheduler = SequentialLR(run.optimizer, [warm_up, steering], milestones=[5])
    rates = []
    for _ in range(8):
        rates += run.rates()
        run.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.01, 0.028, 0.046, 0.064, 0.082])
    # From where the warm-up ended on, a percent a step.
    assert rates[5] == pytest.approx(0.082, rel=0.02)
    assert rates[7] > rates[6] > rates[5]
    assert scheduler.get_last_lr() == run.rates()


def test_chained_with_a_decay() -> None:
    """Catches a scheduler that undoes what the schedulers before it in the chain did."""
    run = Run()
    steering = StabilityLR(run.optimizer, run.monitor, FLAT)
    scheduler = ChainedScheduler([ExponentialLR(run.optimizer, 0.9), steering])
    run.go(scheduler, 3)
    assert run.rates()[0] == pytest.approx(0.05 * (0.9 * 1.01) ** 3, rel=1e-12)


def test_a_run_resumes_where_it_was() -> None:
    """Catches state that is not saved, and state that ``torch.load(weights_only=True)`` refuses."""

    def go_on(run: Run, scheduler: StabilityLR, steps: int) -> None:
        for _ in range(steps):
            run.step()
            scheduler.step()

    target = TargetRegion.flatter(by=3)
    whole = Run(every=3, momentum=0.9)
    scheduler = StabilityLR(whole.optimizer, whole.monitor, target)
    go_on(whole, scheduler, 10)
    buffer = io.BytesIO()
    torch.save(
        {
            "model": whole.model.state_dict(),
            "optimizer": whole.optimizer.state_dict(),
            "monitor": whole.monitor.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        buffer,
    )
    go_on(whole, scheduler, 10)

    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    again = Run(lr=0.3, every=3, momentum=0.9)
    resumed = StabilityLR(again.optimizer, again.monitor, target)
    again.model.load_state_dict(state["model"])
    again.optimizer.load_state_dict(state["optimizer"])
    again.monitor.load_state_dict(state["monitor"])
    resumed.load_state_dict(state["scheduler"])
    assert resumed.target.unit == "absolute"
    go_on(again, resumed, 10)
    assert again.rates() == whole.rates()
    assert all(map(torch.equal, again.weights(), whole.weights()))
    assert list(resumed.decisions) == list(scheduler.decisions)
    assert resumed.last_epoch == scheduler.last_epoch
    with pytest.raises(ValueError, match="lacks"):
        resumed.load_state_dict({"last_epoch": 3})


@pytest.mark.parametrize("options", [{}, {"kick": 0.1}, {"restore": True, "loss_cap": 1e-9}])
def test_a_dry_run_is_the_run_without(options: dict[str, Any]) -> None:
    """Catches a dry run that changes weights, rates or momentum buffers."""
    bare = Run(momentum=0.9)
    for _ in range(12):
        bare.step()
    dry = Run(momentum=0.9)
    scheduler = StabilityLR(dry.optimizer, dry.monitor, FLAT, dry_run=True, **options)
    dry.go(scheduler, 12)
    assert all(map(torch.equal, bare.weights(), dry.weights()))
    assert dry.rates() == [0.05]
    buffers = [run.optimizer.state_dict()["state"] for run in (bare, dry)]
    assert all(
        torch.equal(buffers[0][k]["momentum_buffer"], buffers[1][k]["momentum_buffer"])
        for k in buffers[0]
    )
    assert any(decision.changes for decision in scheduler.decisions)
    assert all(decision.dry_run for decision in scheduler.decisions)


def test_a_relative_target_waits_for_a_good_measurement() -> None:
    """Catches a target resolved by a failed measurement, and a wait without a message."""
    run = Run(max_iter=1)  # one product: it cannot converge
    scheduler = StabilityLR(run.optimizer, run.monitor, TargetRegion.flatter(by=2))
    with pytest.warns(RuntimeWarning, match="did not converge"):
        run.go(scheduler, 2)
    assert run.rates() == [0.05]
    (decision,) = scheduler.decisions
    assert decision.kind == "hold"
    assert "no good one exists yet" in decision.why
    run.monitor.close()
    good = Run()
    scheduler = StabilityLR(good.optimizer, good.monitor, TargetRegion.flatter(by=2))
    good.step()
    scheduler.step()
    first = good.monitor.history[0].sharpness
    assert scheduler.target.sharpness == (0.0, first / 2)


def test_a_lost_loss_is_survived_and_said() -> None:
    """Catches a crash, or a rate that goes on rising, when weights are not finite any more."""
    sent: list[tuple[int, dict[str, float]]] = []
    run = Run(sinks=[lambda step, record: sent.append((step, record))])
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT)
    run.step()
    scheduler.step()
    before = run.rates()[0]
    with pytest.warns(RuntimeWarning, match="failed: not finite"):
        run.go(scheduler, 20, Y * math.nan)
    assert run.rates()[0] == pytest.approx(0.7 * before)
    kinds = [decision.kind for decision in scheduler.decisions]
    assert kinds == ["raise", "cut", "hold"]
    cut = [record for _, record in sent if record.get("lr_to") == pytest.approx(0.7 * before)]
    assert cut[0]["decision"] == 1.0
    assert cut[0]["lr_from"] == before


def test_an_adaptive_optimizer_is_not_steered_by_its_plain_sharpness() -> None:
    """Catches a relative target resolved by plain sharpness, where the preconditioned one counts."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = StabilityMonitor(optimizer, model, MSE, (X, Y), every=5, batch_size=16)
    with pytest.warns(RuntimeWarning, match="has not taken a step yet"):
        first = monitor.measure()
    assert first.sharpness is not None
    assert first.limited_sharpness is None
    scheduler = StabilityLR(optimizer, monitor, TargetRegion.flatter(by=2))
    for _ in range(5):
        optimizer.zero_grad()
        MSE(model(X), Y).backward()
        optimizer.step()
        scheduler.step()
    assert [decision.kind for decision in scheduler.decisions] == ["hold", "raise"]
    preconditioned = monitor.margins.preconditioned_sharpness
    assert scheduler.target.sharpness == (0.0, pytest.approx(preconditioned / 2))
    monitor.close()


def test_bounds_come_from_the_initial_rate_and_are_saved() -> None:
    """Catches default bounds taken from the rate during a warm-up or after loading an optimizer."""
    run = Run(lr=0.5)
    warmup = LinearLR(run.optimizer, start_factor=0.01, total_iters=5)
    steered = StabilityLR(run.optimizer, run.monitor, TargetRegion.within_limits(0.8))
    assert (steered.min_lr, steered.max_lr) == (0.05, 0.5)
    SequentialLR(run.optimizer, [warmup, steered], milestones=[5])
    other = Run(lr=0.1)
    resumed = StabilityLR(other.optimizer, other.monitor, TargetRegion.within_limits(0.8))
    resumed.load_state_dict(steered.state_dict())
    assert (resumed.min_lr, resumed.max_lr, resumed.loss_cap) == (0.05, 0.5, math.inf)
    open_ends = {"min_lr": 0.0, "max_lr": math.inf, "loss_cap": math.inf}
    free = StabilityLR(other.optimizer, other.monitor, FLAT, **open_ends)
    assert {name: getattr(free, name) for name in open_ends} == open_ends


@pytest.mark.parametrize("tensor", [False, True])
def test_a_rate_outside_of_its_bounds_moves_to_the_nearer(tensor: bool) -> None:
    """Catches bounds that the initial rate escapes, and a cut that raises the rate.

    Also catches a float32 rate that moves at each step because 0.3 is not a float32 number.
    """

    def rate(lr: float) -> Any:
        return torch.tensor(lr) if tensor else lr

    high = Run(lr=rate(0.5))
    scheduler = StabilityLR(high.optimizer, high.monitor, FLAT, max_lr=0.3)
    assert high.rates() == [pytest.approx(0.3, rel=1e-7)]  # float32 rounds by 6e-8
    high.go(scheduler, 3)
    assert [(d.kind, d.what) for d in scheduler.decisions] == [("lower", "lr"), ("keep", "lr")]
    assert high.rates() == [pytest.approx(0.3, rel=1e-7)]

    low = Run(lr=rate(0.05))
    scheduler = StabilityLR(low.optimizer, low.monitor, FLAT, min_lr=0.4, loss_cap=1e-9)
    low.go(scheduler, 1)
    assert [(d.kind, d.changes) for d in scheduler.decisions] == [("raise", True), ("cut", False)]
    assert low.rates() == [pytest.approx(0.4, rel=1e-7)]

    dry = Run(lr=rate(0.5))
    scheduler = StabilityLR(dry.optimizer, dry.monitor, FLAT, max_lr=0.3, dry_run=True)
    dry.go(scheduler, 2)
    assert dry.rates() == [0.5]


def test_bounds_hold_beside_other_schedulers_and_without_measurements() -> None:
    """Catches bounds applied only at measurements, and groups that lose their ratios."""
    run = Run(every=1000, groups=(0.4, 0.1))
    steering = StabilityLR(run.optimizer, run.monitor, FLAT, min_lr=0.2)
    scheduler = ChainedScheduler([ExponentialLR(run.optimizer, 0.7), steering])
    for _ in range(4):
        run.go(scheduler)
        assert run.rates()[0] >= 0.2
    assert run.rates() == [0.2, pytest.approx(0.05)]


def test_a_law_of_ones_own() -> None:
    """Catches a scheduler that works only with the built-in laws."""

    def halve(measured: LRMeasured, state: State) -> tuple[Any, State]:
        count = state.get("count", 0) + 1
        return measured.decide("lower", measured.lr / 2, f"call {count:.0f}"), {"count": count}

    run = Run()
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT, law=halve, min_lr=0.02)
    run.go(scheduler, 3)
    assert run.rates() == [0.02]  # the bounds hold for every law
    assert scheduler.state_dict()["law"]["count"] == 3


def test_a_margin_keeps_away_from_its_limit_and_above_its_floor() -> None:
    """Catches a margin law that raises the rate above the user's, or lowers it without end."""
    run = Run(lr=1.5, tol=0.03)
    scheduler = StabilityLR(run.optimizer, run.monitor, TargetRegion.within_limits(0.5))
    assert (scheduler.min_lr, scheduler.max_lr) == (0.15, 1.5)
    run.go(scheduler, 60)
    assert run.monitor.margins.sharpness_ratio < 0.55  # the share, and a step's lag
    assert 0.15 <= run.rates()[0] <= 1.5


def test_what_cannot_be_steered_is_refused() -> None:
    """Catches bad arguments that are accepted and fail, or do nothing, during training."""
    run, other = Run(), Run(quantities=("non_uniformity",))
    make = StabilityLR
    uniform = TargetRegion(non_uniformity=(0, 1.0))
    for arguments, options, error, says in (
        ((run.model, run.monitor, FLAT), {}, TypeError, "optimizer="),
        ((run.optimizer, run.optimizer, FLAT), {}, TypeError, "monitor="),
        ((run.optimizer, run.monitor, 4.0), {}, TypeError, "target=4.0"),
        ((other.optimizer, run.monitor, FLAT), {}, ValueError, "another optimizer"),
        ((run.optimizer, run.monitor, uniform), {}, ValueError, "does not bound the sharpness"),
        ((other.optimizer, other.monitor, FLAT), {}, ValueError, "steering needs the sharpness"),
        ((run.optimizer, run.monitor, FLAT), {"min_lr": 1.0, "max_lr": 0.1}, ValueError, "min_lr"),
        ((run.optimizer, run.monitor, FLAT), {"min_lr": -1.0}, ValueError, "min_lr=-1"),
        ((run.optimizer, run.monitor, FLAT), {"loss_cap": 0.0}, ValueError, "loss_cap=0"),
        ((run.optimizer, run.monitor, FLAT), {"kick": -1.0}, ValueError, "kick=-1"),
    ):
        with pytest.raises(error, match=says):
            make(*arguments, **options)
    assert "initial_lr" not in run.optimizer.param_groups[0]  # refused before anything was changed


def test_sinks_that_fail_do_not_end_the_training() -> None:
    """Catches a sink's exception that ends a scheduler step."""

    def broken(step: int, record: dict[str, float]) -> None:
        if "decision" in record:
            raise OSError("disk full")

    run = Run(sinks=[broken])
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT)
    run.step()
    with pytest.warns(RuntimeWarning, match="disk full"):
        scheduler.step()
    assert run.rates()[0] > 0.05
