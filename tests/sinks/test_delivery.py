"""Delivery to each kind of sink; a failing sink stops neither training nor other sinks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from stableopt import StabilityMargins, StabilityRegion, UpdateRule
from stableopt._support.warn_once import WarnOnce
from stableopt.sinks import Decided, Measured
from stableopt.sinks.delivery import check_sinks, deliver, flush
from stableopt.sinks.events import Event
from stableopt.steering import Decision

MARGINS = StabilityMargins(step=3, lr=0.1, batch_size=4, sharpness=15.0, sharpness_limit=20.0)
MEASURED = Measured(3, MARGINS, UpdateRule(lr=0.1))
DECIDED = Decided(4, Decision("lr", "raise", 0.1, 0.2, "below the gate", step=4))


class Noting:
    """A callable with notes."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def __call__(self, step: int, record: dict[str, float]) -> None:
        self.received.append((step, record))

    def note(self, step: int, text: str) -> None:
        self.received.append((step, text))


class Receiving:
    """A sink for events alone, which cannot be called."""

    def __init__(self) -> None:
        self.received: list[Event] = []

    def receive(self, event: Event) -> None:
        self.received.append(event)


class Both(Noting, Receiving):
    """A sink for events that takes records too."""


class Broken:
    def receive(self, event: Event) -> None:
        raise OSError("disk full")

    flush = None


def test_a_plain_callable_is_called_with_step_and_record() -> None:
    """Catches a callable that gets an event object instead of numbers, or no reason of a decision."""
    sink = Noting()
    for event in (MEASURED, DECIDED):
        deliver(event, [sink], WarnOnce())
    assert sink.received == [
        (3, MARGINS.record()),
        (4, {"decision": 1.0, "lr_from": 0.1, "lr_to": 0.2}),
        (4, "step 4: raise lr 0.1 → 0.2: below the gate"),
    ]


@pytest.mark.parametrize("kind", [Receiving, Both])
def test_a_sink_of_events_gets_the_event_itself_and_once(kind: Any) -> None:
    """Catches an event that is sent as a record as well, and margins or rule that are lost."""
    sink = kind()
    for event in (MEASURED, DECIDED):
        deliver(event, check_sinks(sink), WarnOnce())
    first, second = sink.received
    assert first is MEASURED
    assert second is DECIDED


def test_a_failing_sink_is_warned_of_once_and_the_next_is_served() -> None:
    """Catches a warning at each event, and a sink that changes the record for the next sink."""
    good = Noting()

    def spoil(step: int, record: dict[str, float]) -> None:
        record.clear()

    warn = WarnOnce()
    with pytest.warns(RuntimeWarning, match="the sink Broken failed: OSError: disk full") as caught:
        deliver(MEASURED, [Broken(), spoil, good], warn)
    assert len(caught) == 1
    deliver(MEASURED, [Broken(), spoil, good], warn)  # warnings are errors here
    assert good.received == [(3, MARGINS.record())] * 2


def test_a_sink_may_remove_itself() -> None:
    """Catches the sink after it, which misses the event."""
    last = Noting()

    def once(step: int, record: dict[str, float]) -> None:
        sinks.remove(once)

    class Flushed(Noting):
        def flush(self) -> None:
            sinks.remove(self)
            last.received.append("flush")

    sinks: list[Any] = [once, last]
    deliver(MEASURED, sinks, WarnOnce())
    assert last.received == [(3, MARGINS.record())]
    sinks = [Flushed(), Flushed()]
    flush(sinks, WarnOnce())
    assert last.received[1:] == ["flush"] * 2


def test_other_ranks_do_not_warn() -> None:
    """Catches a warning from each rank, and a failing sink after which the next gets nothing."""
    good = Noting()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deliver(MEASURED, [Broken(), good], WarnOnce(active=False))
    assert caught == []
    assert good.received == [(3, MARGINS.record())]


def test_flush_is_called_where_there_is_one() -> None:
    """Catches a sink without `flush` that ends a run, and an error that hides that of a `with`."""
    flushed = []

    class Buffered(Noting):
        def flush(self) -> None:
            flushed.append(True)
            raise OSError("disk full")

    with pytest.warns(RuntimeWarning, match="Buffered failed to flush: OSError"):
        flush([Noting(), Broken(), Buffered()], WarnOnce())
    assert flushed == [True]


@pytest.mark.parametrize("sinks", ["runs", 5, [None], [Receiving], Noting])
def test_what_is_no_sink_is_refused(sinks: Any) -> None:
    """Catches a class passed instead of its instance, and a path instead of a sink."""
    with pytest.raises(TypeError, match="sinks"):
        check_sinks(sinks)


@pytest.mark.parametrize(
    "rule",
    [
        UpdateRule(lr=0.1),
        UpdateRule(lr=0.1, momentum=0.9, weight_decay=0.3),
        UpdateRule(lr=0.1, momentum=0.9, nesterov=True),
        UpdateRule(lr=0.1, group_lrs=(0.1, 0.02), weight_decay=0.3),
        UpdateRule(lr=0.1, momentum=0.9, dampening=0.9, decoupled_weight_decay=0.5),
    ],
    ids=["SGD", "momentum", "Nesterov", "groups", "AdamW"],
)
@pytest.mark.parametrize(("batch_size", "dataset_size"), [(4, None), (4, 10), (None, 10)])
def test_the_region_of_an_event_is_that_of_its_rule(
    rule: UpdateRule, batch_size: int | None, dataset_size: int | None
) -> None:
    """Catches weight decay counted twice, and a region for another batch size."""
    margins = StabilityMargins(batch_size=batch_size, dataset_size=dataset_size)
    region = Measured(1, margins, rule).region
    expected = StabilityRegion(rule, batch_size, dataset_size)
    assert region is not None
    assert region.boundary(kind="exact").tolist() == expected.boundary(kind="exact").tolist()
    assert region.boundary(kind="box").tolist() == expected.boundary(kind="box").tolist()


def test_the_region_keeps_no_preconditioner() -> None:
    """Catches a sink that keeps a tensor of the model's size alive between measurements."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    (parameter**2).sum().backward()
    assert Measured(0, MARGINS, UpdateRule.from_optimizer(optimizer)).region is None  # not stepped
    optimizer.step()
    rule = UpdateRule.from_optimizer(optimizer)
    region = Measured(1, MARGINS, rule).region
    assert rule.preconditioner is not None
    assert region is not None
    assert region.rule.preconditioner is None
    assert region.max_sharpness == rule.max_sharpness


def test_a_measurement_without_a_rule_has_no_region() -> None:
    """Catches a region drawn for plain SGD where the rule could not be read."""
    assert Measured(3, MARGINS).region is None
