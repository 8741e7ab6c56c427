"""Training to a minimum and continuing from it: the jobs of most experiments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stableopt
from benchmarks.experiments.edge import Edge
from benchmarks.runner import Job, Place, Store, Work, run_all
from benchmarks.training import minimum as solution
from benchmarks.training.data import Dataset
from benchmarks.training.escape import Escape, Switch, box
from benchmarks.training.minimum import Minimum, Solution, flops_per_sample
from benchmarks.training.networks import network
from benchmarks.training.threshold import Thresholds

FEW = Dataset("digits", 16)
QUICK = Solution(FEW, lr=1.0, target_loss=3e-2)


def done(job: Job, store: Store) -> Any:
    """Run a job and return its result."""
    summary = run_all([job], store, Place())
    assert not summary.failed, store.failure(summary.failed[0])
    return store.result(job)


def test_gradient_descent_is_the_plain_loop(tmp_path: Path) -> None:
    """Catches a step too many, a loss of another step, and weights that are not those of the end."""
    store = Store(tmp_path)
    minimum = done(QUICK, store)
    images, model = FEW.load(), network("digits", seed=0)
    steps = 0
    while (loss := nn.functional.mse_loss(model(images.x), images.y)) > 3e-2:
        for p, g in zip(
            model.parameters(), torch.autograd.grad(loss, tuple(model.parameters())), strict=True
        ):
            p.data.sub_(g)
        steps += 1
    assert (minimum.outcome, minimum.steps) == ("reached", steps)
    # The same operations; torch may sum the batch in another order when it is cut into chunks.
    assert minimum.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, p in store.tensors(QUICK).items():
        torch.testing.assert_close(p, model.state_dict()[name])
    margins = stableopt.measure(model, nn.MSELoss(), (images.x, images.y), lr=1.0)
    assert minimum.sharpness == pytest.approx(margins.sharpness, rel=1e-3)  # the solver's tolerance
    assert minimum.sharpness_limit == 2.0
    assert minimum.test_accuracy == images.accuracy(model)


def test_the_recorded_residual_is_relative_to_the_eigenvalue_once() -> None:
    """Catches a residual divided by the eigenvalue twice, which is far from 1 here."""
    images, model = FEW.load(), network("digits", seed=0)
    with torch.no_grad():
        model[-1].weight.mul_(10)
    arguments = (model, nn.MSELoss(), (images.x, images.y))
    margins = stableopt.measure(*arguments, lr=1.0, max_iter=300)
    recorded = solution.measured(model, images, lr=1.0, non_uniformity=False)
    assert recorded["sharpness"] > 4  # far from 1, where dividing twice would not show
    assert recorded["sharpness_relative_residual"] == margins.measurements["sharpness"].residual


def test_a_non_uniformity_of_the_first_images() -> None:
    """Catches a sharpness of these images only, and a limit for batches that are drawn from them."""
    images, model = FEW.load(), network("digits", seed=0)
    whole = solution.measured(model, images, lr=1.0, batch_size=4)
    part = solution.measured(model, images, lr=1.0, batch_size=4, sample=6)
    first = images.x[:6], images.y[:6]
    names = ("non_uniformity",)
    of_first = stableopt.measure(model, nn.MSELoss(), first, quantities=names, max_iter=300)
    assert part == {
        **whole,
        "non_uniformity": of_first.non_uniformity,
        "non_uniformity_relative_residual": of_first.measurements["non_uniformity"].residual,
    }


def test_sgd_is_the_plain_loop(tmp_path: Path) -> None:
    """Catches batches in another order than the seed's, and a test of the loss in mid-epoch."""
    job = replace(QUICK, batch_size=5, seed=3, target_loss=1e-9, max_steps=8)
    store = Store(tmp_path)
    minimum = done(job, store)
    images, model = FEW.load(), network("digits", seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):  # epochs of 4 batches
        for rows in torch.randperm(16, generator=generator).split(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(images.x[rows]), images.y[rows]).backward()
            optimizer.step()
    assert (minimum.outcome, minimum.steps) == ("out of steps", 8)
    # To rounding, since the BLAS may take another kernel for memory that is aligned otherwise.
    torch.testing.assert_close(model.state_dict(), dict(store.tensors(job)))


@pytest.mark.parametrize("together", [False, True])
def test_a_network_without_active_units_has_collapsed(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a dead network that counts as a minimum: it would train only its last bias."""

    def dead(job: Solution, device: str = "cpu") -> nn.Module:
        model = network("digits", seed=job.seed)
        with torch.no_grad():
            model[2].weight.zero_()
            model[2].bias.fill_(-1)
        return model.to(device)

    monkeypatch.setattr(Solution, "model", dead)
    job, store = replace(QUICK, batch_size=4, max_steps=1000), Store(tmp_path)
    if together:
        jobs = [job, replace(job, lr=0.5)]
        works = [Work(each, store, Place()) for each in jobs]
        for each in jobs:
            store.part(each).mkdir(parents=True)
        ends = [Minimum(**fields) for fields in Solution.run_together(jobs, works)]
    else:
        ends = [done(job, store)]
    assert [end.outcome for end in ends] == ["collapsed"] * len(ends)
    assert all(end.steps < 1000 and end.sharpness is None for end in ends)


def test_a_last_layer_that_starts_at_zero_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an end before the first step: all outputs are zero then, and the gradient is not."""

    def silent(job: Solution, device: str = "cpu") -> nn.Module:
        model = network("digits", seed=job.seed)
        nn.init.zeros_(model[-1].weight)
        return model.to(device)

    monkeypatch.setattr(Solution, "model", silent)
    for batch_size in (None, 4):
        job = replace(QUICK, batch_size=batch_size, non_uniformity=False)
        assert done(job, Store(tmp_path)).outcome == "reached"


class _KilledError(BaseException):
    """Stands for a signal: nothing in a job may catch it."""


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_run_that_is_killed_goes_on_where_it_was(
    batch_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint without the order of batches, the trace or the number of steps."""
    job = replace(QUICK, batch_size=batch_size, target_loss=1e-2)
    undisturbed, killed = Store(tmp_path / "a"), Store(tmp_path / "b")
    done(job, undisturbed)
    monkeypatch.setattr(solution, "CHECKPOINT_SECONDS", 0.0)
    original = Work.progress
    looks = 0

    def progress(self: Work, share: float, text: str = "") -> None:
        nonlocal looks
        looks += 1
        if looks == 10:
            raise _KilledError
        original(self, share, text)

    monkeypatch.setattr(Work, "progress", progress)
    with pytest.raises(_KilledError):
        run_all([job], killed, Place())
    assert (killed.part(job) / "checkpoint.pt").exists()
    done(job, killed)
    assert looks > 10
    assert killed.result(job) == undisturbed.result(job)
    assert killed.trace(job) == undisturbed.trace(job)
    for name, p in undisturbed.tensors(job).items():
        assert torch.equal(p, killed.tensors(job)[name])
    assert not (killed.folder(job) / "checkpoint.pt").exists()


def test_divergence_is_an_outcome(tmp_path: Path) -> None:
    """Catches divergence recorded as a failure, and margins measured on non-finite weights."""
    store = Store(tmp_path)
    minimum = done(replace(QUICK, lr=1e6), store)
    assert minimum.outcome == "diverged"
    assert minimum.sharpness is None
    assert minimum.loss is None


def test_sharpness_along_the_way_changes_nothing(tmp_path: Path) -> None:
    """Catches a measurement that changes the run, and a measurement that is not made."""
    watched = replace(QUICK, sharpness_every=10)
    store = Store(tmp_path)
    assert done(watched, store) == done(QUICK, store)
    steps = [r["step"] for r in store.trace(watched) if "sharpness" in r]
    last = store.result(watched).steps
    expected = {s for s in range(last + 1) if s % 10 == 0 or s & (s - 1) == 0}
    assert set(steps) == expected


def test_flops_of_a_network_in_closed_form() -> None:
    """Catches a count of another network: 2 products in each layer but the first, 1 more forwards."""
    weights = [64 * 128, 128 * 128, 128 * 10]
    assert flops_per_sample("digits", None) == 2 * (3 * sum(weights) - weights[0])


@pytest.fixture(scope="module")
def minimum(tmp_path_factory: pytest.TempPathFactory) -> tuple[Solution, Store]:
    store = Store(tmp_path_factory.mktemp("runs"))
    job = Solution(FEW, lr=1.0, target_loss=1e-3)
    done(job, store)
    return job, store


def test_gd_leaves_beyond_its_limit_and_stays_within(minimum: tuple[Solution, Store]) -> None:
    """Catches a prediction that is not the box's, a missed escape, and a false one."""
    start, store = minimum
    a = store.result(start).sharpness
    for factor, leaves in ((0.9, False), (2.0, True)):
        job = Switch(start, lr=factor * 2 / a, batch_size=None, steps=300, look_every=1)
        escape = done(job, store)
        assert escape.predicted == ("escape" if leaves else "stay")
        assert (escape.escaped_at is not None) == leaves
        assert escape.before == store.result(start)
        first = store.trace(job)[0]
        assert (first["step"], first["predicted"]) == (0, escape.predicted)
        if leaves and escape.after is not None:
            assert escape.largest_loss_ratio >= 10


@pytest.mark.parametrize(
    ("end", "returned"), [(1.02, True), (0.76, True), (0.6, False), (1.4, False), (None, False)]
)
def test_an_excursion_is_not_an_escape(end: float | None, returned: bool) -> None:
    """Catches an excursion that counts as an escape, and an escape to elsewhere that does not."""
    before = Minimum("reached", 9, 1e-4, sharpness=20.0)
    after = None if end is None else {"sharpness": 20.0 * end}
    escape = Escape(620, 13.4, after, predicted="stay", before=before)
    assert escape.returned == returned == escape.as_predicted
    stayed = Escape(None, 2.0, {"sharpness": 20.0}, predicted="stay", before=before)
    assert stayed.as_predicted
    assert not stayed.returned


def test_margins_along_the_way(minimum: tuple[Solution, Store]) -> None:
    """Catches tracking that changes SGD's path, and margins that go nowhere."""
    start, store = minimum
    plain = Switch(start, lr=0.2, batch_size=4, steps=20, look_every=5)
    watched = replace(plain, measure_every=10)
    assert done(watched, store) == done(plain, store)
    measured = [r["step"] for r in store.trace(watched) if "sharpness" in r]
    assert measured == [10, 20]
    assert list((store.folder(watched) / "tensorboard").iterdir())


def test_an_escape_trains_on_until_it_has_settled(minimum: tuple[Solution, Store]) -> None:
    """Catches a run that ends before its loss is small again, or goes on though it never left.

    Also catches a run that takes another path when it trains on.
    """
    start, store = minimum
    a = store.result(start).sharpness
    away = Switch(start, lr=2 * 2 / a, batch_size=None, steps=20, look_every=1)
    settled = done(replace(away, settle_loss=2e-3), store)
    assert settled.settled_at > away.steps
    assert settled.after["loss"] <= 2e-3
    longer = done(replace(away, steps=settled.settled_at), store)
    assert longer.after == settled.after
    cut = done(replace(away, settle_loss=1e-9, settle_steps=30), store)
    assert cut.settled_at is None
    assert cut.after["loss"] > 1e-9
    stayed = done(Switch(start, lr=0.5 / a, batch_size=None, steps=10, settle_loss=1e-9), store)
    assert stayed.settled_at is None


def test_independent_batches_are_not_an_epoch(minimum: tuple[Solution, Store]) -> None:
    """Catches independent and reshuffled batches that are drawn in the same way."""
    start, _ = minimum
    images = FEW.load()
    numbered = replace(images, x=torch.arange(16.0)[:, None])
    drawn = {}
    for independent in (False, True):
        job = Switch(start, lr=0.1, batch_size=4, independent=independent)
        batches = job._batches(numbered)
        drawn[independent] = torch.cat([next(batches)[0][:, 0] for _ in range(4)])
        assert all(len(set(b.tolist())) == 4 for b in drawn[independent].split(4))
    assert sorted(drawn[False].tolist()) == list(range(16))
    # That four independent batches of 4 are 16 different rows has probability 1 / 29,000.
    assert len(set(drawn[True].tolist())) < 16


def test_a_switch_needs_a_minimum(tmp_path: Path) -> None:
    """Catches a run from weights that diverged, taken for an escape."""
    lost = replace(QUICK, lr=1e6)
    job = Switch(lost, lr=0.1, batch_size=None, steps=1)
    store = Store(tmp_path)
    summary = run_all([job], store, Place())
    assert summary.failed == [job]
    failure = store.failure(job)
    assert failure is not None


@pytest.mark.parametrize(
    ("a", "s", "escapes", "says"),
    [
        (3.9, 3.9, False, "stable, will stay"),
        (4.0, 4.0, False, "stable, will stay"),
        (4.1, 1.0, True, "a = 4.10 > 2/η = 4.00"),
        (1.0, 4.1, True, "s = 4.10 > √B/η = 4.00"),
    ],
)
def test_the_box_goes_by_the_measured_numbers(a: float, s: float, escapes: bool, says: str) -> None:
    """Catches a prediction that is written down instead of computed."""
    prediction = box(a, s, lr=0.5, batch_size=4, n=10**9)
    assert prediction.escapes is escapes
    assert says in prediction.why


def test_thresholds_are_the_librarys(minimum: tuple[Solution, Store]) -> None:
    """Catches thresholds of other weights, and of another batch size."""
    start, store = minimum
    thresholds = done(Thresholds(start, (1, 16)), store)
    model = start.model()
    model.load_state_dict(store.tensors(start))
    images = FEW.load()
    problem = stableopt.Problem(model, nn.MSELoss(), (images.x, images.y))
    exact = stableopt.critical_lr(problem, batch_size=1, hessians="gauss-newton")
    single, full = thresholds.at(1), thresholds.at(16)
    assert single.critical_lr == pytest.approx(exact.value, rel=1e-3)  # the solver's tolerance
    assert single.theorem1 == pytest.approx(exact.theorem1, rel=1e-3)
    assert single.theorem1 <= single.critical_lr < full.critical_lr
    assert full.critical_lr == pytest.approx(thresholds.full_batch, rel=1e-6)


def test_a_run_that_diverged_has_no_thresholds_and_is_a_row(tmp_path: Path) -> None:
    """Catches a divergence, which is a result, recorded as a failure of the code."""
    edge = Edge(lrs=(), n=60, sgd_n=60, sgd_lrs=(500.0,), batch_sizes=(1,))
    store = Store(tmp_path)
    summary = run_all(edge.jobs(), store, Place())
    assert (summary.failed, summary.blocked) == ([], [])
    rows = edge.tables(store)["settled"]
    assert list(rows.outcome) == ["diverged"]
    assert list(edge.claims({"settled": rows})) == []
