"""The flight recorder in training loops of other kinds: closures, precisions, batches, optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded_runs import LOSS, Run, data
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stableopt import FlightRecorder, StabilityMonitor
from stableopt.recorder.weight_sample import WeightSample
from stableopt.stability.rules.gradient_norms import norms_of_gradients

pytestmark = pytest.mark.filterwarnings("ignore:the measurement at step:RuntimeWarning")


class Loop:
    """A linear model whose optimizer steps with a closure, or without."""

    def __init__(
        self,
        folder: Path | None,
        make: Callable[[Any], Any],
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.x, self.y = (each.to(dtype) for each in data())
        self.model = nn.Linear(8, 2).to(dtype)
        self.optimizer = make(self.model.parameters())
        self.monitor = StabilityMonitor(
            self.optimizer, self.model, self.loss_fn, (self.x, self.y), every=10**6, **options
        )
        self.recorder = None if folder is None else FlightRecorder(self.monitor, folder)
        self.evaluations: list[tuple[float, float]] = []

    def loss_fn(self, prediction: Tensor, y: Tensor) -> Tensor:
        loss = LOSS(prediction, y)
        if getattr(self, "recorder", None) is not None:
            self.recorder.loss(loss)  # also where the monitor evaluates the probe set
        return loss

    def evaluate(self) -> Tensor:
        """Accumulate two micro-batches, as a closure does; return the mean loss."""
        self.optimizer.zero_grad()
        losses = [self.loss_fn(self.model(self.x[k::2]), self.y[k::2]) / 2 for k in (0, 1)]
        for loss in losses:
            loss.backward()
        square = sum(p.grad.square().sum() for p in self.model.parameters())
        loss = losses[0] + losses[1]
        self.evaluations.append((float(loss.detach()), float(square) ** 0.5))
        return loss

    def records(self) -> list[tuple[int, float, float]]:
        self.recorder.close()
        return [(step.step, step.loss, step.grad_norm) for step in self.recorder.evidence.steps]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("make", [sgd, lbfgs])
@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_gives_its_own_step_loss_and_gradient(
    tmp_path: Path, make: Callable[[Any], Any], keyword: bool
) -> None:
    """Catches losses or gradients of another step or trial point, and means over a line search.

    The oracle is what the first evaluation of each step computed.
    """
    loop, bare = Loop(tmp_path, make), Loop(None, make)
    first = []
    for _ in range(3):
        first.append(len(loop.evaluations))
        if keyword:
            loop.optimizer.step(closure=loop.evaluate)
        else:
            loop.optimizer.step(loop.evaluate)
        bare.optimizer.step(bare.evaluate)
        loop.monitor.measure()  # which evaluates the loss, and reports it
    assert torch.equal(loop.model.weight, bare.model.weight)
    expected = [(k + 1, *loop.evaluations[index]) for k, index in enumerate(first)]
    # 1e-6: means and norms in single precision, in another order.
    assert loop.records() == [pytest.approx(each, rel=1e-6) for each in expected]


class Twice(torch.optim.SGD):
    """An optimizer that evaluates its closure twice in a step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
        return loss


@pytest.mark.filterwarnings("ignore:limits are not known:RuntimeWarning")
def test_a_closure_that_raises_ends_its_step_alone(tmp_path: Path) -> None:
    """Catches a recorder that ignores losses from then on, or keeps those of the step that failed."""
    loop = Loop(tmp_path, Twice)

    def failing() -> Tensor:
        if loop.evaluations:
            raise ArithmeticError
        return loop.evaluate()

    with pytest.raises(ArithmeticError):
        loop.optimizer.step(failing)
    loop.optimizer.step(loop.evaluate)
    last = loop.records()[-1]
    assert last[1] == pytest.approx(loop.evaluations[1][0], rel=1e-6)


class Wrapper:
    """An optimizer without torch's hooks."""

    def __init__(self, params: Any) -> None:
        self.optimizer = sgd(params)
        self.param_groups, self.zero_grad = self.optimizer.param_groups, self.optimizer.zero_grad

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        self.optimizer.step(closure)


class Fixed(torch.optim.SGD):
    """An optimizer that refuses the recorder's hooks, and not the monitor's."""

    def register_step_pre_hook(self, hook: Any) -> Any:
        raise TypeError("no hooks")


@pytest.mark.filterwarnings("ignore:limits are not known:RuntimeWarning")
@pytest.mark.parametrize("closure", [True, False])
def test_optimizers_without_hooks_are_observed(tmp_path: Path, closure: bool) -> None:
    """Catches a recorder that fails where the monitor works, and one that stays attached."""
    loop = Loop(tmp_path, Wrapper, quantities=["realised_edge"])
    for _ in range(2):
        if closure:
            loop.optimizer.step(loop.evaluate)
        else:
            loop.evaluate()
            loop.optimizer.step()
    expected = [(k + 1, *evaluation) for k, evaluation in enumerate(loop.evaluations)]
    assert loop.records() == [pytest.approx(each, rel=1e-6) for each in expected]
    assert loop.optimizer.step.__self__ is loop.optimizer
    refused = Loop(None, lambda params: Fixed(params, lr=0.1))
    with pytest.raises(TypeError, match="no hooks"):
        FlightRecorder(refused.monitor, tmp_path)
    assert refused.monitor.sinks == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_double_precision_is_recorded(tmp_path: Path, moment: str) -> None:
    """Catches a recorder that records nothing in double precision, or after a cast to it."""
    single = Loop(tmp_path, sgd)
    double = Loop(tmp_path, sgd, torch.float64 if moment == "before" else torch.float32)
    double.model.double()
    double.x, double.y = double.x.double(), double.y.double()
    for loop in (single, double):
        for _ in range(3):
            loop.evaluate()
            loop.optimizer.step()
    # 1e-5: a few steps in single precision.
    assert double.records() == [pytest.approx(each, rel=1e-5) for each in single.records()]


def test_gradients_of_all_dtypes_have_norms() -> None:
    """Catches a norm that refuses a dtype, overflows in it, or stacks several dtypes."""
    values = {
        torch.float16: 3e4,
        torch.bfloat16: 3e4,
        torch.float32: 3.0,
        torch.float64: 1e100,
        torch.complex64: 3.0,
    }
    params = [nn.Parameter(torch.ones(8, dtype=dtype)) for dtype in values]
    for p, value in zip(params, values.values(), strict=True):
        p.grad = torch.full_like(p, value)
    expected = [value * math.sqrt(8) for value in values.values()]
    # 1e-2: three digits of bfloat16.
    assert norms_of_gradients(params).tolist() == pytest.approx(expected, rel=1e-2)


def test_losses_of_all_dtypes_are_numbers(tmp_path: Path) -> None:
    """Catches sums that overflow or round in half precision, integers, and a first value whose dtype
    all others of the window take.
    """
    loop = Loop(tmp_path, sgd)
    half = torch.tensor(5000.0, dtype=torch.float16)
    unit = torch.tensor(1.0, dtype=torch.bfloat16)
    steps: list[tuple[list[Any], Any]] = [
        ([half] * 16, 0),
        ([unit] * 600, torch.tensor(0.5)),
        ([3], True),
        ([torch.tensor(3)], torch.tensor(2)),
        ([np.float64(1e300), 1e300], 1e300),
        ([np.int64(7), torch.tensor(8.0, dtype=torch.float64)], np.float32(0.25)),
    ]
    for losses, norm in steps:
        for loss in losses:
            loop.recorder.loss(loss, grad_norm=norm)
        loop.optimizer.step()
    with pytest.warns(RuntimeWarning, match="expected a real number"):
        loop.recorder.loss(torch.tensor(1j))
    loop.recorder.close()
    kept = loop.recorder.evidence.steps
    assert [step.loss for step in kept] == [5000.0, 1.0, 3.0, 3.0, 1e300, 7.5]
    assert [step.total_norm for step in kept] == [0.0, 0.5, 1.0, 2.0, 1e300, 0.25]


def test_numbers_of_numpy_are_arguments(tmp_path: Path) -> None:
    """Catches arguments that are refused because they are NumPy numbers."""
    run = Run(tmp_path, window=np.int64(5), check_every=np.int64(2), most_reports=np.int64(1))
    run.train(8)
    assert len(run.recorder.evidence.steps) == 5


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_first_loss_that_is_not_finite_blinds_no_rule(tmp_path: Path, bad: float) -> None:
    """Catches rules that compare with an infinite or NaN first loss for the rest of the run."""
    run = Run(tmp_path, window=25)
    run.recorder.loss(bad)
    run.optimizer.step()
    run.train(40)
    assert len(run.recorder.reports) == 1
    assert 0 < run.recorder.evidence.first_loss < 5
    run.train(5, spoil=30.0)
    assert len(run.recorder.reports) == 2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_a_gradient_scaler_changes_no_norm(tmp_path: Path, fused: bool, unscale: bool) -> None:
    """Catches gradients that are 65,536 times too large, and an alarm for a step that the scaler skips,
    as it does whenever they overflow.
    """
    loop = Loop(tmp_path, lambda params: torch.optim.SGD(params, lr=0.1, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    expected = []
    for step in range(6):
        loop.optimizer.zero_grad()
        loss = loop.loss_fn(loop.model(loop.x), loop.y)
        scaler.scale(loss).backward()
        squares = [p.grad.square().sum() for p in loop.model.parameters()]
        expected.append(float(torch.stack(squares).sum().sqrt()) / scaler.get_scale())
        if step == 2:
            loop.model.weight.grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(loop.optimizer)
        scaler.step(loop.optimizer)
        scaler.update()
    loop.recorder.close()
    assert loop.recorder.reports == []
    norms = [step.grad_norm for step in loop.recorder.evidence.steps if step.grad_norms]
    del expected[2]
    # 1e-6: in single precision.
    assert norms == pytest.approx(expected, rel=1e-6)


class Counted(TorchDispatchMode):
    """Counts what operations write to new memory, and the numbers that they give to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.written = self.read = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.read += op is torch.ops.aten._local_scalar_dense.default
        if isinstance(result, Tensor) and not op.is_view:
            self.written += result.numel()
        return result


@pytest.mark.parametrize("several", [False, True])
def test_rates_in_tensors_are_read_with_the_other_numbers(tmp_path: Path, several: bool) -> None:
    """Catches a wait for the device at each step, where capturable optimizers keep their rate; and the
    rate of a later step, since schedulers change the tensor in place.
    """
    reads = []
    for recorded in (False, True):
        model, (x, y) = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), data()
        layers = [
            {"params": layer.parameters(), "lr": torch.tensor(0.5 ** (1 + several * k))}
            for k, layer in enumerate(model)
        ]
        optimizer = torch.optim.SGD(layers, foreach=False)
        monitor = StabilityMonitor(optimizer, model, LOSS, (x, y), every=10**6, batch_size=4)
        recorder = FlightRecorder(monitor, tmp_path, check_every=10)
        if not recorded:
            recorder.close()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            with Counted() as counted:
                optimizer.step()
            reads.append(counted.read)
            scheduler.step()
        monitor.close()
    recorder.close()
    assert reads[3:] == reads[:3]
    kept, rates = recorder.evidence.steps, (0.5, 0.25, 0.125)
    assert [step.lr for step in kept] == list(rates)
    assert [list(step.lrs) for step in kept] == [[lr, lr / 2] if several else [] for lr in rates]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.permute(3, 1, 0, 2),
    "with an offset": lambda t: torch.cat([t, t]).to(memory_format=torch.channels_last)[32:],
    "with gaps": lambda t: torch.cat([t, t], dim=3)[..., :4],
    "expanded": lambda t: t[:, :1].expand(-1, 64, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_layout_are_sampled_without_a_copy(layout: str) -> None:
    """Catches all weights copied at each step where they are not contiguous, as under channels_last,
    and a sample that misses entries or takes others.
    """
    generator = torch.Generator().manual_seed(0)
    weight = LAYOUTS[layout](torch.randn(32, 64, 4, 4, generator=generator))
    sample = WeightSample([nn.Parameter(weight)], ["0.weight"])
    with Counted() as counted:
        taken = sample.take()
    # The sample itself, and where entries lie with gaps, their positions in each dimension.
    assert counted.written <= 64 * 256 < weight.numel()
    assert 250 <= len(taken) <= 256
    assert set(taken.tolist()) <= set(weight.flatten().tolist())
    if layout != "expanded":
        assert len(set(taken.tolist())) == len(taken)
    # 20 %: five times the error of a norm from 256 entries.
    assert float(sample.norms(taken)) == pytest.approx(float(weight.norm()), rel=0.2)


@pytest.mark.parametrize("kind", ["column", "imaginary part"])
def test_a_sample_meets_every_column(kind: str) -> None:
    """Catches equal steps that are a multiple of a row's length, or of the two parts of a complex
    number: the sample is then one column alone, here one of zeros.
    """
    weight = torch.ones(512, 512)
    weight[:, 0] = 0
    if kind == "imaginary part":
        weight = torch.complex(torch.zeros(512, 512), weight)
    sample = WeightSample([nn.Parameter(weight)], ["0.weight"])
    # 20 %: five times the error of a norm from 256 entries.
    assert float(sample.norms(sample.take())) == pytest.approx(float(weight.norm()), rel=0.2)


def test_a_compiled_step_has_the_report_of_an_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches recorder hooks that the compiler traces, so that no measurement follows the alarm."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # no figure
    outcomes = []
    for compiled in (False, True):
        run = Run(tmp_path / str(compiled), lr=30.0)
        if compiled:
            # The eager backend: the graph is what tracing is about, code generation is torch's own.
            run.optimizer.step = torch.compile(run.optimizer.step, backend="eager")
        run.train(9)
        torch._dynamo.reset()
        outcomes.append([run.report()["alarm"], [m.step for m in run.recorder.evidence.measured]])
        run.monitor.close()
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == [5]


def test_joint_steps_that_stay_incomplete_keep_no_weights(tmp_path: Path) -> None:
    """Catches a sample of the weights kept for each step of one optimizer while the other pauses."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    first, second = (torch.optim.SGD(part.parameters(), lr=0.01) for part in model)
    x, y = torch.ones(4, 4), torch.zeros(4, 2)
    with (
        StabilityMonitor([first, second], model, nn.MSELoss(), (x, y), every=100) as monitor,
        FlightRecorder(monitor, tmp_path, check_every=100) as recorder,
    ):
        for _ in range(5):
            nn.MSELoss()(model(x), y).backward()
            first.step()
        pending = recorder._pending._pending
        assert len(pending) == 5
        assert sum(step.sample is not None for step in pending) == 1  # that of the open step
