"""`train`: several solutions trained as one network with stacked weights, to keep a GPU busy.

A step of a small network takes a GPU microseconds and the host longer. Members that share data,
network and batch size therefore take their steps together: their weights are stacked along a first
dimension and :func:`torch.vmap` makes each layer a batched product. Each member has its own learning
rate and, under SGD, its own batches, drawn from its own generator in the same order as alone. It
takes the same steps, to rounding.

A member that has ended is copied out and stays in the stack without effect until half of the stack
has ended; then the stack is cut down to the others. A member that diverges does not affect the
others: only losses are summed over members, and the gradient of each is its own.

An ensemble has no checkpoints: one that is killed starts again. The step runs eagerly, with a
number of kernels that does not grow with the members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state

from benchmarks.runner import Work
from benchmarks.training.data import Images
from benchmarks.training.loops import collapsed
from benchmarks.training.spec import Spec, outcome, report, worth_a_line

__all__ = ["Ending", "Stack", "train"]


@dataclass(frozen=True)
class Ending:
    """How a member ended.

    Attributes:
        outcome: ``"reached"``, ``"diverged"``, ``"out of steps"`` or ``"collapsed"``.
        steps: until then.
        loss: training loss after them.
        weights: the network's parameters by name.
    """

    outcome: str
    steps: int
    loss: float
    weights: dict[str, Tensor]


def train(jobs: Sequence[Spec], works: Sequence[Work], images: Images) -> list[Ending]:
    """Train solutions whose ``together`` is equal, until the last of them ends; return all ends.

    Args:
        jobs: at least one.
        works: theirs, for traces and progress.
        images: theirs, on the device.
    """
    for work in works:
        work.restored()
    stack = Stack(jobs, images, works[0].place.device)
    first = stack.losses()
    endings: dict[int, Ending] = {}
    while len(endings) < len(jobs):
        if stack.active(endings) <= len(stack.members) // 2:
            stack.keep([k for k, member in enumerate(stack.members) if member not in endings])
        for k, (member, loss) in enumerate(zip(stack.members, stack.look(), strict=True)):
            if member in endings:
                continue
            job, work = jobs[member], works[member]
            if worth_a_line(stack.epochs):
                work.trace(step=stack.steps, loss=loss)
            dead = partial(stack.collapsed, k)
            ended = outcome(job, stack.steps, loss, epochs=stack.epochs, dead=dead)
            if ended is not None:
                endings[member] = Ending(ended, stack.steps, loss, stack.weights(k))
            else:
                report(job, work, stack.steps, loss, first[member])
        stack.on()
    return [endings[member] for member in range(len(jobs))]


class Stack:
    """The stacked weights of the members in training, and their steps.

    Attributes:
        members: their places among the jobs.
        steps: that they have taken.
    """

    def __init__(self, jobs: Sequence[Spec], images: Images, device: str) -> None:
        models = [job.model(device) for job in jobs]
        self.images, self.batch_size = images, jobs[0].batch_size
        self.model = models[0]
        stacked, buffers = stack_module_state(models)
        if buffers:
            raise ValueError(f"{', '.join(buffers)}: members with buffers cannot be trained as one")
        self.params: dict[str, Tensor] = stacked
        self.lrs = torch.tensor([job.lr for job in jobs]).to(device)
        self.generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        self.members = list(range(len(jobs)))
        self.steps = 0
        self.chunks = images.chunks()
        self.gradients: tuple[Tensor, ...] = ()

    @property
    def epochs(self) -> int:
        """The epochs taken; with GD, an epoch is a step."""
        return self.steps // math.ceil(len(self.images.x) / (self.batch_size or len(self.images.x)))

    def active(self, endings: dict[int, Ending]) -> int:
        """Return how many have not ended."""
        return sum(member not in endings for member in self.members)

    def weights(self, k: int) -> dict[str, Tensor]:
        """Return a copy of the k-th one's parameters."""
        return {name: p[k].detach().clone() for name, p in self.params.items()}

    def collapsed(self, k: int) -> bool:
        """Say whether all samples have the same outputs of the k-th one."""
        own = self.weights(k)
        return collapsed(lambda x: functional_call(self.model, own, (x,)), self.images)

    def keep(self, kept: list[int]) -> None:
        """Drop the other members."""
        rows = torch.tensor(kept).to(self.lrs.device)
        self.params = {
            name: p.detach()[rows].requires_grad_(True) for name, p in self.params.items()
        }
        self.lrs = self.lrs[rows]
        self.generators = [self.generators[k] for k in kept]
        self.members = [self.members[k] for k in kept]

    def look(self) -> list[float]:
        """Return each member's training loss; under GD, keep its gradient for the step."""
        if self.batch_size is not None:
            return self.losses()
        losses = torch.zeros(len(self.members), device=self.lrs.device)
        gradients = [torch.zeros_like(p) for p in self.params.values()]
        for x, y in self.chunks:
            part = self._loss(x, y, shared=True) * (len(x) / len(self.images.x))
            for total, g in zip(gradients, self._gradients(part), strict=True):
                total += g
            losses += part.detach()
        self.gradients = tuple(gradients)
        return losses.tolist()

    def losses(self) -> list[float]:
        """Return each member's training loss."""
        losses = torch.zeros(len(self.members), device=self.lrs.device)
        with torch.no_grad():
            for x, y in self.chunks:
                losses += self._loss(x, y, shared=True) * (len(x) / len(self.images.x))
        return losses.tolist()

    def on(self) -> None:
        """Take a step of GD, by the gradient of the last look, or an epoch of SGD."""
        if self.batch_size is None:
            self._step(self.gradients)
            return
        n, device = len(self.images.x), self.images.x.device
        orders = torch.stack([torch.randperm(n, generator=g) for g in self.generators])
        for rows in orders.to(device).split(self.batch_size, dim=1):
            loss = self._loss(self.images.x[rows], self.images.y[rows], shared=False)
            self._step(self._gradients(loss))

    def _loss(self, x: Tensor, y: Tensor, *, shared: bool) -> Tensor:
        """Return each member's mean squared error, on shared samples or on its own."""
        out = torch.vmap(
            lambda params, x: functional_call(self.model, params, (x,)),
            in_dims=(0, None if shared else 0),
        )(self.params, x)
        return (out - y).square().flatten(1).mean(1)

    def _gradients(self, losses: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses.sum(), tuple(self.params.values()))

    @torch.no_grad()
    def _step(self, gradients: Sequence[Tensor]) -> None:
        for p, gradient in zip(self.params.values(), gradients, strict=True):
            p.addcmul_(gradient, self.lrs.view(-1, *[1] * (p.ndim - 1)), value=-1)
        self.steps += 1
