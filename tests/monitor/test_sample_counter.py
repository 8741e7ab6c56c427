"""The batch size and data set size that the limits use: observed or given."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monitored_runs import MSE, X, Y, linear, start, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stableopt
from stableopt import StabilityMonitor


def limit(lr: float, batch: int, n: float) -> Any:
    """Return the limit of equation (9), sqrt(B (n-1) / (n-B)) / lr, up to a few roundings."""
    factor = 1.0 if n == math.inf else (n - 1) / (n - batch)
    return pytest.approx(math.sqrt(batch * factor) / lr, rel=1e-14)


def test_batch_size_is_observed() -> None:
    """Catches limits for another batch size than training uses."""
    model, optimizer, monitor = start()
    assert monitor.batch_size is None
    train(model, optimizer, rows=slice(0, 3))
    assert monitor.batch_size == 3
    assert monitor.margins is not None
    assert (monitor.margins.batch_size, monitor.margins.dataset_size) == (3, 12)
    assert monitor.margins.non_uniformity_limit == limit(0.1, 3, 12)


def test_gradient_accumulation_counts_as_one_batch() -> None:
    """Catches the size of a micro-batch taken for that of the step."""
    model, optimizer, monitor = start()
    for _ in range(2):
        optimizer.zero_grad()
        for rows in (slice(0, 4), slice(4, 7)):
            MSE(model(X[rows]), Y[rows]).backward()
        optimizer.step()
    assert monitor.batch_size == 7


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation_between_steps_is_not_counted(mode: Callable[[], Any]) -> None:
    """Catches samples of a validation pass added to the next step's."""
    model, optimizer, monitor = start()
    for _ in range(3):
        train(model, optimizer)
        with mode():
            model(X)
    assert monitor.batch_size == 4


def test_other_measurements_are_not_counted() -> None:
    """Catches the passes of a second monitor, or of ``measure``, taken for training batches."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitors = [StabilityMonitor(optimizer, model, MSE, (X, Y), every=1) for _ in range(2)]
    for _ in range(3):
        both = ("sharpness", "non_uniformity")
        stableopt.measure(model, MSE, (X, Y), optimizer=optimizer, quantities=both)
        train(model, optimizer)
    assert [m.batch_size for monitor in monitors for m in monitor.history] == [4] * 6


def test_ragged_last_batch_does_not_count() -> None:
    """Catches limits that jump at the end of each epoch: the median is the epoch's batch size."""
    model, optimizer, monitor = start()
    for rows in (slice(0, 5), slice(5, 10), slice(10, 12), slice(0, 5)):
        train(model, optimizer, rows=rows)
    assert [m.batch_size for m in monitor.history] == [5] * 4


@pytest.mark.parametrize("tracked", ["model", "compiled"])
def test_batch_size_of_a_compiled_model(tracked: str) -> None:
    """Catches a hook on the compiled or the original module only, which a call of the other bypasses."""
    model = linear()
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model if tracked == "model" else compiled, MSE, (X, Y), every=1)
    train(compiled, optimizer, 2)
    torch._dynamo.reset()
    assert [(m.batch_size, m.failure) for m in monitor.history] == [(4, None)] * 2


def test_batch_size_and_dataset_size_as_given() -> None:
    """Catches given sizes that observed batches or the probe set override."""
    model, optimizer, monitor = start(batch_size=6, dataset_size=100)
    train(model, optimizer)
    assert monitor.margins is not None
    assert (monitor.margins.batch_size, monitor.margins.dataset_size) == (6, 100)
    assert monitor.margins.non_uniformity_limit == limit(0.1, 6, 100)


def test_observed_batch_above_the_probe_set() -> None:
    """Catches a finite-n limit for a probe set that cannot be the training set, and silence."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X[:3], Y[:3]), every=1)
    with pytest.warns(RuntimeWarning, match="more samples than the 3 probe samples") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1
    assert [(m.batch_size, m.dataset_size, m.failure) for m in monitor.history] == [
        (4, None, None)
    ] * 3
    assert monitor.history[0].non_uniformity_limit == limit(0.1, 4, math.inf)


def test_a_batch_as_large_as_the_probe_counts_as_full() -> None:
    """Catches a limit of the non-uniformity that is infinite without a word, at one batch size."""
    quantities = ("sharpness", "non_uniformity")
    for size, options, says in (
        (12, {}, "steps have as many samples as the probe, 12, and count as full batches"),
        (11, {}, None),
        (12, {"dataset_size": 12}, None),
        (12, {"batch_size": 12}, None),
        (12, {"quantities": ("sharpness",)}, None),
    ):
        model, optimizer, monitor = start(**{"quantities": quantities, **options})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, rows=slice(0, size))
        messages = [str(each.message) for each in caught if "full batches" in str(each.message)]
        assert len(messages) == (says is not None)
        assert says is None or messages[0].startswith(says)
        assert monitor.margins.batch_size == size


def test_observed_batch_above_the_given_dataset_size() -> None:
    """Catches a batch larger than the given data set that passes without a warning."""
    model, optimizer, monitor = start(dataset_size=2)
    with pytest.warns(RuntimeWarning, match="dataset_size=2"):
        train(model, optimizer, 2)
    assert ["dataset_size=2" in str(m.failure) for m in monitor.history] == [True] * 2


def test_a_packed_sequence_is_counted_and_left_alone() -> None:
    """Catches a hook that rebuilds the user's containers, and time steps counted as samples."""
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(2, 3), nn.Linear(3, 1)

        def forward(self, x: Any) -> Tensor:
            return self.head(self.rnn(x)[1][-1])

    model = Recurrent()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 6, 2), torch.randn(4, 1)
    problem = stableopt.Problem.from_batch_loss(
        model, lambda model, batch: MSE(model(batch[0].transpose(0, 1)), batch[1]), [(x, y)]
    )
    monitor = optimizer.track(problem, every=1)
    lengths = torch.tensor([6, 4, 3, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    MSE(model(packed), y).backward()
    optimizer.step()
    assert monitor.batch_size == 4


def test_a_tracked_model_can_be_scripted() -> None:
    """Catches a hook in the model that torch.jit.script cannot compile, and an obscure error.

    Without ``batch_size=``, the error names this argument.
    """
    model, x, y = nn.Linear(2, 1), torch.ones(4, 2), torch.zeros(4, 1)
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, nn.MSELoss(), (x, y), every=1)
    with pytest.raises(AttributeError, match=r"torch.jit.script .* pass batch_size="):
        torch.jit.script(model)
    monitor.close()
    optimizer.track(model, nn.MSELoss(), (x, y), every=1, batch_size=2)
    scripted = torch.jit.script(model)
    nn.MSELoss()(scripted(x), y).backward()
    optimizer.step()
    assert optimizer.margins is not None
    assert optimizer.margins.batch_size == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_pass_counts_once(reentrant: bool) -> None:
    """Catches a batch of twice the size where activation checkpointing runs the whole model again."""
    model, optimizer, monitor = start()
    x = X[:4].clone().requires_grad_()  # which reentrant checkpoints need
    for _ in range(2):
        optimizer.zero_grad()
        MSE(checkpoint(model, x, use_reentrant=reentrant), Y[:4]).backward()
        optimizer.step()
        assert monitor.batch_size == 4


def test_samples_that_are_not_counted_are_reported() -> None:
    """Catches a run whose hooks do not fire, as in earlier compiled code, that seems stable."""
    model, optimizer, monitor = start(quantities=("sharpness", "non_uniformity"))
    MSE(model.forward(X), Y).backward()
    with pytest.warns(RuntimeWarning, match="no samples of a step were counted; pass batch_size="):
        optimizer.step()
    assert monitor.margins.non_uniformity is not None
    assert monitor.margins.sharpness_ratio < 1
    assert monitor.margins.stable is None


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, stableopt.LBFGS])
def test_a_batch_evaluated_at_several_points_counts_once(kind: type) -> None:
    """Catches a mini-batch of L-BFGS that counts once for each evaluation of its line search."""
    model = linear()
    optimizer = kind(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    monitor = StabilityMonitor(optimizer, model, MSE, (X, Y), every=1)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        # Two micro-batches, which do count as one batch.
        loss: Tensor = MSE(model(X[:4]), Y[:4]) + MSE(model(X[4:7]), Y[4:7])
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert evaluations > 2 * 3
    assert monitor.batch_size == 7
    assert list(monitor._counter.observed) == [7, 7, 7]


@pytest.mark.parametrize("form", ["two passes", "one pass of both"])
def test_a_loss_of_pairs_counts_pairs(form: str) -> None:
    """Catches a preference loss, of a chosen and a rejected sample, whose batch counts double."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if form == "two passes":
            chosen, rejected = model(batch["chosen"]), model(batch["rejected"])
        else:
            chosen, rejected = model(torch.cat([batch["chosen"], batch["rejected"]])).chunk(2)
        return -nn.functional.logsigmoid(chosen - rejected).mean()

    pairs = {"chosen": X, "rejected": -X.roll(1, 0)}
    monitor = optimizer.track(stableopt.Problem.from_batch_loss(model, loss, pairs), every=1)
    for rows in (slice(0, 4), slice(4, 8)):
        optimizer.zero_grad()
        loss(model, {name: x[rows] for name, x in pairs.items()}).backward()
        optimizer.step()
    assert [m.batch_size for m in monitor.history] == [4, 4]
    monitor.count_samples(X[:5])
    optimizer.step()
    assert monitor.batch_size == 5


def test_a_step_on_one_of_the_stacked_batches_is_one_sample() -> None:
    """Catches the pairs of a contrastive loss counted as samples: a sample is a whole batch."""
    torch.manual_seed(0)
    encoder = nn.Linear(4, 2)
    optimizer = stableopt.SGD(encoder.parameters(), lr=0.1)
    views = torch.randn(12, 8, 4)

    def contrastive(model: nn.Module, batches: Tensor) -> Tensor:
        codes = model(batches)
        similarities = codes @ codes.mT
        labels = torch.arange(similarities.shape[-1]).expand(similarities.shape[:-1])
        return nn.functional.cross_entropy(similarities.flatten(0, -2), labels.flatten())

    problem = stableopt.Problem.from_batch_loss(encoder, contrastive, views)
    quantities = ("sharpness", "non_uniformity")
    monitor = optimizer.track(problem, every=1, quantities=quantities)
    sizes, limits = [], []
    for batch in (views[0], views[1], views[:2]):
        optimizer.zero_grad()
        contrastive(encoder, batch).backward()
        monitor._counter.observed.clear()  # the size of this step alone
        optimizer.step()
        sizes.append(monitor.batch_size)
        assert monitor.margins is not None
        limits.append(monitor.margins.non_uniformity_limit)
    assert sizes == [1, 1, 2]
    assert limits == [limit(0.1, size, 12) for size in sizes]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_batch_counts_its_samples(layout: torch.layout) -> None:
    """Catches a forward pass that raises under a monitor, since nested tensors have no shape."""
    model, optimizer, monitor = start(every=5)
    rows = [X[:2], X[2:5], X[5:6]]
    output = model(torch.nested.as_nested_tensor(rows, layout=layout))
    sum(part.square().mean() for part in output.unbind()).backward()
    optimizer.step()
    assert monitor.batch_size == 3


class Sizeless(Tensor):
    """A tensor that does not say how large it is."""

    def dim(self) -> int:
        raise NotImplementedError("no dimensions")


def test_a_batch_that_cannot_be_counted_leaves_the_size_unknown() -> None:
    """Catches a forward pass that raises for want of a count, and a step counted in part.

    Steps whose samples are counted follow, and give the size again.
    """
    model, optimizer, monitor = start(every=100)
    odd = X[:4].as_subclass(Sizeless)
    train(model, optimizer)
    assert monitor.batch_size == 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            MSE(model(odd), Y[:4]).backward()
            MSE(model(X[:3]), Y[:3]).backward()
            optimizer.step()
            assert monitor.batch_size is None
    (warning,) = caught
    assert "samples of a step were not counted: NotImplementedError: no dim" in str(warning.message)
    train(model, optimizer, rows=slice(0, 5))
    assert monitor.batch_size == 5
    monitor.count_samples(odd)  # warned of already
    optimizer.step()
    assert monitor.batch_size is None
