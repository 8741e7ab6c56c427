"""Losses that weigh samples, and their Hessians by dense differentiation of each sample's part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N = 10
CLASSES = torch.tensor([1.0, 7.0, 0.3], dtype=torch.float64)


class Case(NamedTuple):
    """A loss, and the same loss as a sum of terms with weights ``(n,)`` and losses of one sample."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    data: tuple[Tensor, Tensor]
    terms: list[tuple[Tensor, Callable[[Any, Any], Tensor]]]
    sample_weight: Any = None


class Tokens(nn.Module):
    """A language model of two numbers a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embedding(x)))
        return logits.transpose(1, 2)


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


def class_weights() -> Case:
    y = torch.randint(3, (N,))
    loss = nn.CrossEntropyLoss(CLASSES)
    return Case(network(3), loss, (random(N, 2), y), [(CLASSES[y], cross_entropy)])


def padded_tokens() -> Case:
    x, y = torch.randint(4, (2, N, 5))
    lengths = torch.arange(N) % 6  # also a sample without any target
    y[torch.arange(5) >= lengths[:, None]] = -100

    def of_sample(outputs: Tensor, labels: Tensor) -> Tensor:
        counted = labels != -100
        losses = cross_entropy(outputs, labels.clamp(min=0)) * counted
        return losses.sum() / counted.sum().clamp(min=1)

    y = y.clamp(max=2)
    return Case(Tokens(), nn.CrossEntropyLoss(), (x, y), [(lengths.clamp(max=5), of_sample)])


def two_heads() -> Case:
    y, flipped = torch.randint(3, (N,)), CLASSES.flip(0)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        first = F.cross_entropy(outputs[:, :3], labels, CLASSES)
        second = F.cross_entropy(outputs[:, 2:], labels, flipped, label_smoothing=0.1)
        return first + 0.3 * second + 0.1 * outputs.square().mean()

    def second_of(outputs: Tensor, labels: Tensor) -> Tensor:
        return 0.3 * F.cross_entropy(outputs[:, 2:], labels, flipped, label_smoothing=0.1)

    terms = [
        (CLASSES[y], lambda out, label: cross_entropy(out[:, :3], label)),
        (flipped[y], second_of),
        (torch.ones(N), lambda out, label: 0.1 * out.square().mean()),
    ]
    return Case(network(5), loss, (random(N, 2), y), terms)


def own_weights() -> Case:
    y = torch.cat([random(N, 2), 3 * torch.rand(N, 1).double() + 0.1], 1)
    y[[2, 3, 4, 7], 2] = 0.0  # a chunk of three without weight, whose own loss is 0/0

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        squares = (outputs - y[:, :2]).square().sum(1)
        return (y[:, 2] * squares).sum() / y[:, 2].sum()

    def of_sample(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y[:, :2]).square().sum()

    return Case(
        network(2), loss, (random(N, 2), y), [(y[:, 2], of_sample)], lambda batch: batch[1][:, 2]
    )


WEIGHTED = {
    "class weights": class_weights,
    "padded tokens": padded_tokens,
    "two heads": two_heads,
    "own weights": own_weights,
}


def built(name: str) -> Case:
    """Return a case in double precision, the same at each call."""
    torch.manual_seed(0)
    case: Case = WEIGHTED[name]()
    case.model.double()
    for p in case.model.parameters():
        nn.init.normal_(p, std=0.8)
    return case


def sample_hessians(case: Case, *, linearised: bool = False) -> Tensor:
    """Return the Hessians ``(n, d, d)`` of n w_i f_i / sum(w), each by dense differentiation.

    Those of the ``linearised`` model are its Gauss-Newton matrices.
    """
    shapes = {name: p.shape for name, p in case.model.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in case.model.parameters()])

    def outputs_of(at: Tensor, x: Tensor) -> Tensor:
        parts = torch.split(at, [shape.numel() for shape in shapes.values()])
        named = {k: part.view(shapes[k]) for k, part in zip(shapes, parts, strict=True)}
        outputs: Tensor = torch.func.functional_call(case.model, named, (x,))
        return outputs

    found = []
    for index in range(N):
        x, y = (t[index : index + 1] for t in case.data)
        jacobian = torch.func.jacrev(outputs_of)(theta, x).detach() if linearised else None

        def weighted(
            at: Tensor,
            x: Tensor = x,
            y: Tensor = y,
            index: int = index,
            jacobian: Tensor | None = jacobian,
        ) -> Tensor:
            outputs = outputs_of(at if jacobian is None else theta, x)
            if jacobian is not None:
                outputs = outputs + jacobian @ (at - theta)
            losses = [
                w.double()[index] / w.sum() * loss(outputs, y).sum() for w, loss in case.terms
            ]
            return N * torch.stack(losses).sum()

        found.append(torch.func.jacrev(torch.func.grad(weighted))(theta))
    return torch.stack(found)
