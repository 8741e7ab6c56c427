"""What an evaluation leaves behind when several threads make one."""

from __future__ import annotations

import threading

import torch
from torch import nn

from stableopt.curvature.quiet import undisturbed


def test_threads_take_turns() -> None:
    """Catches a state that is noted while another thread has it changed: the eval mode and the fixed
    seed of that one's evaluation would then be put back for good.
    """
    model, cpu = nn.Dropout(), torch.device("cpu")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    waiting, entered = threading.Event(), threading.Event()

    def other() -> None:
        waiting.set()
        with undisturbed(model, cpu):
            entered.set()

    thread = threading.Thread(target=other)
    with undisturbed(model, cpu):
        torch.rand(5)
        thread.start()
        waiting.wait(timeout=10)
        assert not entered.wait(timeout=0.2)
    thread.join(timeout=10)
    assert entered.is_set()
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
