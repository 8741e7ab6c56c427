"""The registry of quantities: a new one is one entry, and everything carries it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stableopt import (
    JSONLinesSink,
    StabilityMargins,
    StabilityMonitor,
    TensorBoardSink,
    measure,
    plot,
)
from stableopt.sinks.tensorboard import layout
from stableopt.stability import (
    QUANTITIES,
    Chart,
    DiagonalPreconditioner,
    Measurement,
    Quantity,
    QuantityResult,
    UpdateRule,
    register,
)
from stableopt.stability.measure.evaluation import Evaluation

Data = tuple[Tensor, Tensor]


def _step_length(evaluation: Evaluation) -> QuantityResult:
    assert evaluation.rule is not None
    length = evaluation.rule.lr * float(evaluation.problem.gradient().norm())
    return QuantityResult(length, measurement=Measurement(length, 0.0, 1))


@pytest.fixture
def toy() -> Iterator[Quantity]:
    """A quantity by one entry: the length of the step along the gradient, at most B."""
    yield register(
        Quantity(
            "step_length",
            _step_length,
            needs={"rule", "batch_size"},
            limit=lambda rule, batch_size, dataset_size: batch_size,
            chart=Chart("step length", r"$\eta\|g\|$", tag="step_len"),
        )
    )
    del QUANTITIES["step_length"]


def gradient_norm(network: nn.Module, data: Data) -> float:
    nn.MSELoss()(network(data[0]), data[1]).backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])  # type: ignore[union-attr]
    network.zero_grad()
    return float(gradient.norm())


def test_measure_takes_a_registered_quantity(network: nn.Module, data: Data, toy: Quantity) -> None:
    """Catches a second list of quantities, which lacks the registered one."""
    names = ("step_length", "sharpness")
    margins = measure(network, nn.MSELoss(), data, lr=0.5, batch_size=4, quantities=names)
    result = margins["step_length"]
    assert result.value == pytest.approx(0.5 * gradient_norm(network, data))
    assert result.limit == 4.0
    assert result.ratio == pytest.approx(result.value / 4)
    assert result.measurement is not None
    assert result.measurement.seconds > 0
    assert list(margins.measurements) == ["sharpness", "step_length"]
    assert StabilityMargins.from_dict(margins.to_dict()) == margins
    with pytest.raises(ValueError, match="step_length needs a learning rate and a batch size"):
        measure(network, nn.MSELoss(), data, lr=0.5, quantities=("step_length",))


def test_the_monitor_and_its_sinks_carry_a_registered_quantity(
    network: nn.Module, data: Data, toy: Quantity, tmp_path: Path
) -> None:
    """Catches a sink or a figure with a list of names, and a checkpoint that loses unknown ones."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    lines = JSONLinesSink(tmp_path / "margins.jsonl")
    board = TensorBoardSink(tmp_path / "board", max_diagrams=0)
    monitor = StabilityMonitor(
        optimizer,
        network,
        nn.MSELoss(),
        data,
        every=1,
        batch_size=4,
        quantities=("sharpness", "step_length"),
        sinks=[lines, board],
    )
    with monitor:
        nn.MSELoss()(network(data[0]), data[1]).backward()
        optimizer.step()
    assert monitor.margins is not None
    record = monitor.margins.record()
    assert record["step_length"] == monitor.margins["step_length"].value
    assert record["step_length_ratio"] == record["step_length"] / record["step_length_limit"]
    line = json.loads(lines.path.read_text())
    assert line["step_length"] == record["step_length"]
    assert line["step_length_limit"] == 4.0
    board.close()
    scalars = _scalars(tmp_path / "board")
    for tag, expected in (
        ("step_length", record["step_length"]),
        ("step_len_value", record["step_length"]),
        ("step_len_lower", 0.99 * 4),
        ("step_len_upper", 1.01 * 4),
        ("step_len_ratio", record["step_length_ratio"]),
        ("step__ratio_low", 0.99),
        ("step__ratio_up", 1.01),
    ):
        # Event files hold float32.
        assert scalars[f"stability/{tag}"] == pytest.approx(expected, rel=1e-6)
    assert "step length / limit" in layout({"step_length"})["edge of stability"]
    assert "step length / limit" not in layout(())["edge of stability"]  # an empty chart elsewhere
    *_, panel = plot.margins(monitor.history).axes
    assert panel.get_ylabel().startswith("step length")

    state = monitor.state_dict()
    del QUANTITIES["step_length"]
    try:
        restored = StabilityMargins.from_dict(state["history"][0])
        assert restored["step_length"].value == record["step_length"]
        assert restored.record() == record
        with pytest.raises(KeyError, match="expected one of sharpness"):
            StabilityMargins()["step_length"]
    finally:
        register(toy)


def _scalars(folder: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def test_margins_take_registered_names_alone(toy: Quantity) -> None:
    """Catches a misspelt quantity that is silently kept, and a ratio given rather than computed."""
    margins = StabilityMargins(step_length=1.0, step_length_limit=4.0)
    assert margins["step_length"].ratio == 0.25
    assert margins["step_length"].margin == 3.0
    for wrong in ({"shrpness": 1.0}, {"sharpness_ratio": 0.5}, {"step_length_margin": 1.0}):
        with pytest.raises(TypeError, match="expected some of sharpness"):
            StabilityMargins(**wrong)


def test_a_limit_on_the_learning_rate_is_compared_with_it() -> None:
    """Catches a ratio upside down, and one of an old rate after `replace`."""
    import dataclasses

    margins = StabilityMargins(lr=0.1, critical_lr=0.4, critical_lr_lower=0.2)
    assert margins["critical_lr"].ratio == margins.critical_lr_ratio == 0.25
    assert margins["critical_lr"].lower == 0.2
    assert margins["critical_lr"].limit is None
    assert dataclasses.replace(margins, lr=0.2).critical_lr_ratio == 0.5
    assert set(margins.record()) > {"critical_lr", "critical_lr_lower", "critical_lr_ratio"}


def test_flat_checkpoints_are_read() -> None:
    """Catches margins of an earlier version that can no longer be loaded."""
    measurement = {"value": 9.0, "residual": 0.01, "products": 7, "seconds": 0.5, "converged": True}
    state = {
        "step": 3,
        "lr": 0.1,
        "batch_size": 4,
        "dataset_size": None,
        "loss": 0.5,
        "sharpness": 9.0,
        "sharpness_limit": 20.0,
        "preconditioned_sharpness": None,
        "preconditioned_sharpness_limit": None,
        "non_uniformity": None,
        "non_uniformity_limit": math.inf,
        "theorem1": None,
        "critical_lr": 0.2,
        "critical_lr_lower": 0.1,
        "batch_sharpness": None,
        "measurements": {"sharpness": measurement},
        "failure": None,
        "method": "double backward",
    }
    margins = StabilityMargins.from_dict(state)
    assert margins["sharpness"] == QuantityResult(
        9.0, 20.0, 0.45, measurement=Measurement(**measurement)
    )
    assert margins.non_uniformity_limit == math.inf
    assert margins["critical_lr"] == QuantityResult(0.2, ratio=0.5, lower=0.1)
    written = margins.to_dict()
    assert {name: value for name, value in state.items() if value is not None} == {
        name: value for name, value in written.items() if value is not None
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register(QUANTITIES["sharpness"]), "registered already"),
        (lambda: Quantity("two words", _step_length), "name='two words'"),
        (lambda: Quantity("sharpness_ratio", _step_length), "does not end in _limit"),
        (lambda: Chart("title", "x", tag="longer_than_9"), "tag='longer_than_9'"),
        (lambda: Chart("title", "x", tag="t", short_tag="longer"), "short_tag='longer'"),
    ],
)
def test_bad_entries_are_named(call, message: str) -> None:
    """Catches an entry whose keys in a record clash with another's."""
    with pytest.raises(ValueError, match=message):
        call()


class Halving(torch.optim.SGD):
    """Steps at half of its learning rate."""


def test_blocks_of_a_preconditioner_are_not_those_of_optimizers(
    network: nn.Module, data: Data
) -> None:
    """Catches an attribute of the user's own preconditioner taken for a step without a joint limit."""

    class Kronecker(DiagonalPreconditioner):
        blocks = torch.ones(3, 3)

    params = list(network.parameters())
    rule = UpdateRule(lr=0.1, preconditioner=Kronecker(params, [2.0] * len(params)))
    assert rule.blocks == ()
    assert measure(network, nn.MSELoss(), data, update_rule=rule).edge_ratio is not None


def test_an_optimizer_reader_is_one_call(network: nn.Module, data: Data) -> None:
    """Catches a second list of known optimizers besides the readers."""
    from stableopt.stability.rules.update_rule import REGISTRY

    UpdateRule.register(Halving, lambda opt: UpdateRule(lr=opt.param_groups[0]["lr"] / 2))
    try:
        optimizer = Halving(network.parameters(), lr=0.5)
        margins = measure(network, nn.MSELoss(), data, optimizer=optimizer)
        assert margins["sharpness"].limit == 2 / 0.25
        with StabilityMonitor(optimizer, network, nn.MSELoss(), data, every=1) as monitor:
            assert monitor.measure().sharpness_limit == 2 / 0.25
    finally:
        REGISTRY.remove(Halving)
