"""`train`: trains several solutions as one network with stacked weights, to keep a GPU busy.

A step of a small network takes a GPU less time than the host needs to launch it. Members with the same
data, network and batch size therefore step together: their weights are stacked along a first dimension,
and :func:`torch.vmap` turns each layer into a batched product. Each member keeps its own learning rate
and, under SGD, its own batches from its own generator. Its steps equal those of a lone run, to rounding.

A member that has ended stays in the stack, its weights copied, until half of the stack has ended; then
the stack is reduced to the others. A diverging member does not affect the others: only losses are summed
over members, so each gradient depends on one member.

An ensemble has no checkpoints: if it is killed, it starts over. The step runs eagerly, and its number of
kernels does not depend on the number of members.
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
from benchmarks.training.spec import Spec, is_traced, outcome, report

__all__ = ["Ending", "Stack", "train"]


@dataclass(frozen=True)
class Ending:
    """The end of a member's training.

    Attributes:
        outcome: ``"reached"``, ``"diverged"``, ``"out of steps"`` or ``"collapsed"``.
        steps: number of steps taken.
        loss: training loss after them.
        weights: the network's parameters by name.
    """

    outcome: str
    steps: int
    loss: float
    weights: dict[str, Tensor]


def train(jobs: Sequence[Spec], works: Sequence[Work], images: Images) -> list[Ending]:
    """Train solutions with equal ``together``; return their endings.

    Args:
        jobs: at least one.
        works: one per job, for traces and progress.
        images: their images, on the device.
    """
    for work in works:
        work.restored()
    stack = Stack(jobs, images, works[0].place.device)
    initial_losses = stack.losses()
    endings: dict[int, Ending] = {}
    while len(endings) < len(jobs):
        if stack.active(endings) <= len(stack.members) // 2:
            stack.keep_only([k for k, member in enumerate(stack.members) if member not in endings])
        losses = stack.training_losses()
        for k, (member, loss) in enumerate(zip(stack.members, losses, strict=True)):
            if member in endings:
                continue
            job, work = jobs[member], works[member]
            if is_traced(stack.epochs):
                work.trace(step=stack.steps, loss=loss)
            has_collapsed = partial(stack.has_collapsed, k)
            result = outcome(
                job, stack.steps, loss, epochs=stack.epochs, has_collapsed=has_collapsed
            )
            if result is not None:
                endings[member] = Ending(result, stack.steps, loss, stack.weights(k))
            else:
                report(job, work, stack.steps, loss, initial_losses[member])
        stack.advance()
    return [endings[member] for member in range(len(jobs))]


class Stack:
    """The stacked weights of the members in training, and their steps.

    Attributes:
        members: the members' indices in the list of jobs.
        steps: number of steps taken.
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
        """Number of epochs taken; under GD an epoch is one step."""
        return self.steps // math.ceil(len(self.images.x) / (self.batch_size or len(self.images.x)))

    def active(self, endings: dict[int, Ending]) -> int:
        """Return the number of members that have not ended."""
        return sum(member not in endings for member in self.members)

    def weights(self, k: int) -> dict[str, Tensor]:
        """Return a copy of the k-th member's parameters."""
        return {name: p[k].detach().clone() for name, p in self.params.items()}

    def has_collapsed(self, k: int) -> bool:
        """Return whether the k-th member's outputs are the same for all samples."""
        weights = self.weights(k)
        return collapsed(lambda x: functional_call(self.model, weights, (x,)), self.images)

    def keep_only(self, kept: list[int]) -> None:
        """Reduce the stack to the members at these positions."""
        kept_indices = torch.tensor(kept).to(self.lrs.device)
        self.params = {
            name: p.detach()[kept_indices].requires_grad_(True) for name, p in self.params.items()
        }
        self.lrs = self.lrs[kept_indices]
        self.generators = [self.generators[k] for k in kept]
        self.members = [self.members[k] for k in kept]

    def training_losses(self) -> list[float]:
        """Return each member's training loss; under GD, also compute the gradients of the next step."""
        if self.batch_size is not None:
            return self.losses()
        losses = torch.zeros(len(self.members), device=self.lrs.device)
        gradients = [torch.zeros_like(p) for p in self.params.values()]
        for x, y in self.chunks:
            chunk_losses = self._loss(x, y, shared=True) * (len(x) / len(self.images.x))
            for total, g in zip(gradients, self._gradients(chunk_losses), strict=True):
                total += g
            losses += chunk_losses.detach()
        self.gradients = tuple(gradients)
        return losses.tolist()

    def losses(self) -> list[float]:
        """Return each member's training loss, without gradients."""
        losses = torch.zeros(len(self.members), device=self.lrs.device)
        with torch.no_grad():
            for x, y in self.chunks:
                losses += self._loss(x, y, shared=True) * (len(x) / len(self.images.x))
        return losses.tolist()

    def advance(self) -> None:
        """Take an epoch of SGD, or a step of GD with the gradients from :meth:`training_losses`."""
        if self.batch_size is None:
            self._step(self.gradients)
            return
        n, device = len(self.images.x), self.images.x.device
        orders = torch.stack([torch.randperm(n, generator=g) for g in self.generators])
        for rows in orders.to(device).split(self.batch_size, dim=1):
            loss = self._loss(self.images.x[rows], self.images.y[rows], shared=False)
            self._step(self._gradients(loss))

    def _loss(self, x: Tensor, y: Tensor, *, shared: bool) -> Tensor:
        """Return each member's mean squared error, on ``shared`` samples or on its own."""
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
