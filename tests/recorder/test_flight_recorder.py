"""The flight recorder on real runs: planted causes, what it writes, and that it leaves no trace."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from recorded_runs import LOSS, Run, data
from torch import nn

import stableopt
from stableopt import FlightRecorder, StabilityMonitor
from stableopt.recorder import AlarmRules, Evidence
from stableopt.recorder.weight_sample import WeightSample
from stableopt.report import read_run

# Runs that spike may end where the loss is not finite, and the monitor then says so.
pytestmark = pytest.mark.filterwarnings("ignore:the measurement at step:RuntimeWarning")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "flight")
    yield made
    made.monitor.close()


def test_an_embedding_has_one_active_input(tmp_path: Path) -> None:
    """Catches torch's default embedding blamed for weights that are not divided by many inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(512, 256), nn.Linear(256, 256), nn.Linear(256, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    words = torch.randint(512, (8,))
    for tied, gain in ((False, 1.0), (True, 16.0)):
        if tied:
            model[1].weight = nn.Parameter(model[0].weight.detach()[:256])
            model[0].weight = model[1].weight
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with StabilityMonitor(
            optimizer, model, LOSS, (words % 256, torch.zeros(8, 4)), every=100
        ) as monitor:
            recorder = FlightRecorder(monitor, tmp_path)
            assert recorder.evidence.first_gains["0"] == pytest.approx(gain, rel=0.02)
            recorder.close()


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run whose learning rate rises from 0.1 to 3 at step 81."""
    made = Run(tmp_path_factory.mktemp("spiked"), keep_weights=True)
    made.train(80)
    made.good = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.optimizer.param_groups[0]["lr"] = 3.0
    made.train(25)
    return made


def test_a_healthy_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    """Catches a false alarm, and a folder that is made before it is needed."""
    run.train(100)
    run.recorder.close()
    assert run.recorder.reports == []
    assert not (tmp_path / "flight").exists()


def test_a_raised_learning_rate_is_found(spiked: Run) -> None:
    """Catches a spike without a report, and one whose cause is not the planted one."""
    report = spiked.report()
    assert report["verdict"]["cause"] == "learning rate"
    assert report["verdict"]["step"] == 81
    assert "The learning rate rose from 0.1 to 3 at step 81." in report["verdict"]["text"]
    assert 81 <= report["alarm"]["step"] <= 105
    steps = report["evidence"]["steps"]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert len(steps[0]["batch"]) == 32
    assert set(steps[0]["grad_norms"]) == {"0", "2", "4"}
    assert sum(report["evidence"]["measured"][-1]["shares"].values()) == pytest.approx(1.0)


def test_an_odd_batch_is_found_with_its_samples(run: Run) -> None:
    """Catches a verdict that blames the curvature that the batch leaves behind."""
    run.train(70)
    state = run.generator.get_state()
    run.train(1, spoil=200.0)
    after = run.generator.get_state()
    run.generator.set_state(state)
    rows = torch.randint(128, (32,), generator=run.generator).tolist()
    run.generator.set_state(after)
    run.train(20)
    report = run.report()
    assert (report["verdict"]["cause"], report["verdict"]["step"]) == ("batch", 71)
    assert ", ".join(map(str, rows[:8])) in report["verdict"]["text"]


def test_a_scaled_layer_is_found_in_the_first_steps(tmp_path: Path) -> None:
    """Catches a recorder that needs a history, and a verdict that names a neighbouring layer."""
    run = Run(tmp_path)
    with torch.no_grad():
        run.model[4].weight.mul_(20.0)
    run.recorder.close()
    run.recorder = FlightRecorder(run.monitor, tmp_path)
    run.train(5)
    report = run.report()
    assert (report["verdict"]["cause"], report["verdict"]["layer"]) == ("layer", "4")
    assert report["alarm"]["step"] == 5


def test_the_report_reads_well(spiked: Run) -> None:
    """Catches Markdown that is broken, and a figure that is missing or empty."""
    (path,) = spiked.recorder.reports
    assert path.name == f"step-{spiked.report()['alarm']['step']}"
    names = ["last_good.pt", "report.json", "report.md", "report.png"]
    assert sorted(file.name for file in path.iterdir()) == names
    text = (path / "report.md").read_text()
    assert text.startswith("# Step ")
    assert "Likely cause: **learning rate**" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in rows} <= {4, 5}
    assert (path / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["spike", "infinite"])
def test_a_late_look_finds_what_earlier_ones_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Catches a missed spike, or non-finite loss, that is over when the recorder looks.

    Neither steps read earlier, by a checkpoint or a measurement, nor a short window may hide them.
    """
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # figures take most of the time
    ends = []
    for number, options in enumerate(({}, {"check_every": 50}, {"check_every": 50, "window": 60})):
        run = Run(tmp_path / str(number), lr=1e-3, record=False)
        run.monitor.close()
        monitor = StabilityMonitor(run.optimizer, run.model, LOSS, (run.x, run.y), every=10**6)
        with (
            monitor,
            FlightRecorder(monitor, tmp_path / str(number), measure=False, **options) as recorder,
        ):
            for k in range(1, 201):
                bad = {"spike": 105 <= k < 120, "infinite": k == 112}[kind]
                level = {"spike": 10.0, "infinite": math.inf}[kind] if bad else 1.0
                recorder.loss(level * (1 + 0.1 * math.sin(k)))
                run.optimizer.step()
                if k == 133:
                    recorder.state_dict()
        (path,) = recorder.reports
        content = json.loads((path / "report.json").read_text())
        ends.append((content["alarm"], content["evidence"]["steps"][-1]["step"]))
    assert ends[0] == ends[1] == ends[2]


def test_training_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    """Catches a recorder that changes gradients, the random state, or the order of anything."""
    recorded, bare = Run(tmp_path), Run(tmp_path, record=False)
    for each in (recorded, bare):
        each.train(50)
        each.optimizer.param_groups[0]["lr"] = 3.0
        each.train(15)
    assert recorded.recorder.reports
    for mine, other in zip(recorded.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_several_optimizers_are_one_step(tmp_path: Path) -> None:
    """Catches a record for each of two optimizers, and a learning rate of the first alone."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)), data()
    slow = torch.optim.SGD(model[0].parameters(), lr=0.1)
    fast = torch.optim.SGD(model[2].parameters(), lr=0.3)
    with StabilityMonitor([slow, fast], model, LOSS, (x, y), every=5) as monitor:
        recorder = FlightRecorder(monitor, tmp_path)
        for _ in range(5):
            LOSS(model(x), y).backward()
            slow.step()
            fast.step()
        steps = recorder.evidence.steps
        assert [(step.step, step.lr) for step in steps] == [(k, 0.3) for k in range(1, 6)]


def test_memory_and_disk_are_bounded(tmp_path: Path) -> None:
    """Catches a report for every step of a diverged run, and lists that grow without bound."""
    run = Run(tmp_path, lr=3.0, window=20, most_reports=2)
    run.train(80)
    assert len(run.recorder.evidence.steps) == 20
    assert len(run.recorder.evidence.measured) <= 20
    assert 1 <= len(run.recorder.reports) <= 2
    assert len(list(tmp_path.iterdir())) == len(run.recorder.reports)


def test_the_last_good_weights_are_those_before_the_spike(spiked: Run) -> None:
    """Catches weights that are kept after the alarm, or that need pickle to load."""
    kept = torch.load(spiked.recorder.reports[0] / "last_good.pt", weights_only=True)
    assert all(torch.equal(kept[name], value) for name, value in spiked.good.items())


def test_hostile_losses_and_gradients(run: Run) -> None:
    """Catches a crash on floats, vectors or strings as losses, and on parameters without gradient."""
    run.recorder.loss(1.5)
    run.train(1)
    run.recorder.loss(torch.tensor([1.0, 3.0]))
    run.model[0].weight.grad = None
    run.optimizer.step()
    with pytest.warns(RuntimeWarning, match="cannot read a loss"):
        run.recorder.loss("two")  # type: ignore[arg-type]
    run.optimizer.step()
    state = run.recorder.state_dict()["evidence"]["steps"]
    assert [step["loss"] for step in state][1:] == [2.0, None]
    assert [step["step"] for step in state] == [1, 2, 3]


def test_closing_detaches(run: Run) -> None:
    """Catches hooks that stay behind."""
    run.recorder.close()
    run.recorder.close()
    run.train(20)
    assert list(run.recorder.evidence.steps) == []
    assert run.monitor.sinks == []


def test_arguments(run: Run, tmp_path: Path) -> None:
    """Catches bad arguments that are accepted and fail during training."""
    with pytest.raises(TypeError, match="expected a StabilityMonitor"):
        FlightRecorder(run.optimizer, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rules="):
        FlightRecorder(run.monitor, tmp_path, rules={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window=0"):
        FlightRecorder(run.monitor, tmp_path, window=0)
    (tmp_path / "plain").write_text("")
    for place in ("plain", "plain/a/b"):
        with pytest.raises(ValueError, match=r"expected a folder, and .*plain is not one"):
            FlightRecorder(run.monitor, tmp_path / place)
    assert stableopt.FlightRecorder is FlightRecorder
    assert stableopt.AlarmRules is AlarmRules
    assert AlarmRules(ratio=2).ratio == 2


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
def test_a_killed_run_leaves_only_whole_reports(tmp_path: Path) -> None:
    """Catches a half-written report where the process is killed, at any moment of writing."""
    script = textwrap.dedent(
        """
        import os, pathlib, signal, sys, warnings
        import torch
        from matplotlib.figure import Figure
        from stableopt.recorder import Alarm, Evidence, StepRecord, Verdict, report
        warnings.simplefilter("ignore")
        die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        folder = pathlib.Path(sys.argv[1])
        parts = Alarm("loss", 7, "the loss rose"), Verdict("unknown", "It rose."), Evidence([], [])
        report.write_report(folder, *parts)
        moments = [(pathlib.Path, "write_text"), (Figure, "savefig"), (torch, "save"), (os, "rename")]
        for where, name in moments:
            child = os.fork()
            if child == 0:
                setattr(where, name, die)
                report.write_report(folder, *parts, {"weight": torch.ones(1)})
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
        """
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-7"]
    json.loads((tmp_path / "step-7" / "report.json").read_text())
    assert len(list(tmp_path.glob(".unfinished-*"))) == 4
    assert [report.step for report in read_run(tmp_path).reports] == [7]


def test_a_layer_that_an_event_scales_is_found(run: Run) -> None:
    """Catches a verdict that blames the next batch, or the neighbouring layers that become sharp.

    The event follows a measured step, whose end the recorder sees after the measurement.
    """
    run.train(70)
    with torch.no_grad():
        run.model[4].weight.mul_(30.0)
        run.model[2].weight.data *= 1.2
    run.train(10)
    verdict = run.report()["verdict"]
    assert (verdict["cause"], verdict["layer"], verdict["step"]) == ("weights", "4", 71)
    changed = {step["step"]: step["changed"] for step in run.report()["evidence"]["steps"]}
    # The norm is that of weights and biases, and the event leaves the biases.
    assert changed.pop(71) == {"4": pytest.approx(30.0, rel=0.1)}
    assert not any(changed.values())


def test_a_layer_whose_learning_rate_is_too_high_is_found(tmp_path: Path) -> None:
    """Catches a verdict that names a neighbour: its gradients and curvature grow with the weights."""
    run = Run(tmp_path)
    run.recorder.close()
    run.monitor.close()
    rates = {0: 0.1, 2: 0.1, 4: 50.0}
    groups = [{"params": run.model[index].parameters(), "lr": lr} for index, lr in rates.items()]
    run.optimizer = torch.optim.SGD(groups)
    with StabilityMonitor(run.optimizer, run.model, LOSS, (run.x, run.y), every=10) as monitor:
        run.recorder = FlightRecorder(monitor, tmp_path)
        run.train(20)
    report = run.report()
    assert (report["verdict"]["cause"], report["verdict"]["layer"]) == ("learning rate", "4")
    assert "group 2 (4) is 50, where 0.1 is usual" in report["verdict"]["text"]
    assert report["evidence"]["groups"] == [["0"], ["2"], ["4"]]
    assert report["evidence"]["steps"][0]["lrs"] == [0.1, 0.1, 50.0]


def test_movement_is_that_of_the_weights(run: Run) -> None:
    """Catches a movement of another step or layer, against a loop that copies the weights."""
    run.optimizer.param_groups[0]["lr"] = 30.0
    expected = []
    for _ in range(4):
        before = [p.detach().clone() for p in run.model[4].parameters()]
        run.train(1)
        length = norm = 0.0
        for old, new in zip(before, run.model[4].parameters(), strict=True):
            length += float((new.detach() - old).square().sum())
            norm += float(old.square().sum())
        expected.append((length / norm) ** 0.5)
    run.recorder.close()
    moved = [step.moved.get("4", 0.0) for step in run.recorder.evidence.steps]
    # 1e-5: sums of squares in single precision.
    assert moved == pytest.approx(expected, rel=1e-5)


def test_a_sample_stands_for_all_weights() -> None:
    """Catches a weight sample whose norms differ from those of the whole layers.

    Layers have several, one-element, transposed, complex and half-precision parameters.
    """
    torch.manual_seed(0)
    params = {
        "a.weight": torch.randn(300, 200).T,
        "a.bias": torch.randn(300) * 30,
        "b": torch.tensor(2.0, dtype=torch.float64),
        "c.weight": torch.randn(3000, dtype=torch.complex64),
        "c.bias": torch.randn(5).half(),
    }
    sample = WeightSample(list(params.values()), list(params))
    assert sample.layers == ["a", "b", "c"]
    before = sample.take()
    assert len(before) <= 5 * 256
    exact: dict[str, float] = {}
    for name, value in params.items():
        layer = name.partition(".")[0]
        exact[layer] = math.hypot(exact.get(layer, 0.0), float(value.abs().float().norm()))
    # 18 %: four standard deviations of the root mean square of 256 normal numbers.
    assert sample.norms(before).tolist() == pytest.approx(list(exact.values()), rel=0.18)
    params["b"].mul_(3.0)
    assert sample.norms(sample.take() - before).tolist() == [0.0, 4.0, 0.0]


def test_hostile_batches_and_numbers_do_not_end_the_training(tmp_path: Path) -> None:
    """Catches an error of the recorder that ends training: batches that raise, NaN, a full disk."""

    class Batch:
        def __iter__(self) -> Iterator[int]:
            raise RuntimeError("no indices")

    run = Run(tmp_path, window=10)
    full = mock.patch.object(Path, "write_text", side_effect=OSError(28, "No space left on device"))
    with warnings.catch_warnings(record=True) as caught, full:
        warnings.simplefilter("always")
        for _ in range(12):
            run.recorder.loss(float("nan"), Batch())  # type: ignore[arg-type]
            for p in run.model.parameters():
                p.grad = torch.full_like(p, torch.nan)
            run.optimizer.step()
        run.recorder.close()
    messages = " ".join(str(warning.message) for warning in caught)
    assert "no indices" in messages
    assert "No space left on device" in messages
    assert list(tmp_path.iterdir()) == []
    assert len(run.recorder.evidence.steps) == 10


class Steps:
    """Trains with AdamW, a schedule, and clipped gradients; step 71 has bad labels."""

    def __init__(
        self, folder: Path, *, norms: bool = False, bad: bool = True, warm: int = 0
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        (x, y), generator = data(), torch.Generator().manual_seed(2)
        steps = 90 if bad else 200
        with (
            StabilityMonitor(optimizer, model, LOSS, (x, y), every=20) as monitor,
            FlightRecorder(monitor, folder) as recorder,
        ):
            for k in range(1, steps + 1):
                decay = 1.0 if bad else 0.5 + 0.5 * math.cos(math.pi * k / steps)
                optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, k / max(warm, 1)) * decay
                rows = torch.randint(128, (32,), generator=generator)
                loss = LOSS(model(x[rows]), y[rows] + 20.0 * (bad and k == 71))
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                recorder.loss(loss, rows, grad_norm=norm if norms else None)
                optimizer.step()
        self.recorder = recorder


@pytest.mark.parametrize("warm", [0, 200])
@pytest.mark.parametrize("norms", [True, False])
def test_an_odd_batch_is_found_under_clipping(tmp_path: Path, norms: bool, warm: int) -> None:
    """Catches an odd batch that is missed because of clipping or a warm-up."""
    recorder = Steps(tmp_path, norms=norms, warm=warm).recorder
    verdict = json.loads((recorder.reports[0] / "report.json").read_text())["verdict"]
    assert (verdict["cause"], verdict["step"]) == ("batch", 71)
    assert verdict["advice"].startswith("Look at these samples.")
    assert "What to do: Look at" in (recorder.reports[0] / "report.md").read_text()
    assert ("gradient of the batch" if norms else "are clipped at 0.3") in verdict["text"]


def test_a_healthy_run_with_warm_up_and_clipping_gives_no_alarm(tmp_path: Path) -> None:
    """Catches a false alarm in a usual schedule."""
    assert Steps(tmp_path, bad=False, warm=40).recorder.reports == []


def test_a_warm_up_to_a_peak_that_is_too_high_is_found(run: Run) -> None:
    """Catches a verdict that blames the layer at the edge instead of the schedule that led there."""
    while run.steps < 150 and not run.recorder.reports:
        run.optimizer.param_groups[0]["lr"] = 0.02 * (run.steps + 1)
        run.train(1)
    verdict = run.report()["verdict"]
    assert verdict["cause"] == "learning rate"
    assert "still rising in warm-up" in verdict["text"]


def test_micro_batches_are_averaged_and_the_last_norm_counts(run: Run) -> None:
    """Catches the last micro-batch's loss recorded as that of the step; the oracle is the plain mean."""
    for losses in ([1.0, 2.0, 6.0], [4.0]):
        for index, loss in enumerate(losses):
            run.recorder.loss(torch.tensor(loss), [index], grad_norm=10.0 * loss)
        run.optimizer.step()
    run.recorder.close()
    kept = run.recorder.evidence.steps
    assert [(step.loss, step.batch, step.total_norm) for step in kept] == [
        (3.0, [0, 1, 2], 60.0),
        (4.0, [0], 40.0),
    ]
    assert Evidence.from_dict(run.recorder.evidence.to_dict()) == run.recorder.evidence


def test_a_norm_that_is_none_is_warned_of(run: Run) -> None:
    """Catches a sharded norm that is summed, which would wait for other ranks, and a vector."""

    class Sharded:
        def full_tensor(self) -> None:
            raise AssertionError

    with pytest.warns(RuntimeWarning, match=r"pass grad_norm\.full_tensor\(\)"):
        run.recorder.loss(1.0, grad_norm=Sharded())  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="cannot read a loss"):
        run.recorder.loss(3.0, grad_norm=torch.ones(2))
    run.optimizer.step()
    run.recorder.close()
    assert [(step.loss, step.total_norm) for step in run.recorder.evidence.steps] == [(2.0, None)]


def test_a_monitor_that_is_not_there_yet_is_explained(tmp_path: Path) -> None:
    """Catches an error that does not say what to do where a callback has no monitor before training."""
    with pytest.raises(TypeError, match=r"StabilityCallback\(\.\.\., recorder=folder\)"):
        FlightRecorder(None, tmp_path)  # type: ignore[arg-type]
