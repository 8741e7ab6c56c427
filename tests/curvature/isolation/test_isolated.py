"""Isolated evaluations: several threads at once, and tensors outside of the parameters."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor, nn

import stableopt
from stableopt.curvature.isolation.isolated import isolated


def test_threads_take_turns() -> None:
    """Catches a snapshot taken during another thread's evaluation: its eval mode and fixed seed
    would be restored for good.
    """
    model, cpu = nn.Dropout(), torch.device("cpu")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    waiting, entered = threading.Event(), threading.Event()

    def evaluate() -> None:
        waiting.set()
        with isolated(model, cpu):
            entered.set()

    thread = threading.Thread(target=evaluate)
    with isolated(model, cpu):
        torch.rand(5)
        thread.start()
        waiting.wait(timeout=10)
        assert not entered.wait(timeout=0.2)
    thread.join(timeout=10)
    assert entered.is_set()
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


class Teacher(nn.Module):
    """A model whose forward pass lets a frozen copy follow it, through ``data``, as MoCo's does."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
        self.seen, self.calls = torch.zeros(2), np.zeros(1)
        self.fixed = np.ones(2)
        self.fixed.flags.writeable = False  # which nothing can write back to

    def forward(self, x: Tensor) -> Tensor:
        for student, teacher in zip(
            self.student.parameters(), self.teacher.parameters(), strict=True
        ):
            teacher.data.mul_(0.999).add_(student.detach(), alpha=0.001)
        self.seen.data.add_(1)
        self.calls += 1
        return self.student(x) - self.teacher(x).detach()


def test_what_follows_the_model_stays_where_it_is() -> None:
    """Catches a measurement that changes frozen parameters, tensors or arrays where no version
    counter shows it: training would continue from the changed values.
    """
    torch.manual_seed(0)
    model = Teacher()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stableopt.measure(
        model,
        nn.MSELoss(),
        (torch.randn(20, 3), torch.randn(20, 2)),
        lr=0.1,
        quantities=("sharpness", "non_uniformity"),
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.seen.any()
    assert not model.calls.any()


def test_an_evaluation_begins_again() -> None:
    """Catches a second pass that sees what the first left: its counts, draws and modes."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def forward(self) -> tuple[int, float, bool]:
            self.seen.append(float(torch.rand(())))
            self.training = True
            return len(self.seen), self.seen[-1], self.training

    model = Counting()
    model.seen.append(0.5)
    with isolated(model, torch.device("cpu")) as restart:
        first_pass = model()
        restart()
        assert not model.training
        assert model() == first_pass
    assert model.seen == [0.5]
