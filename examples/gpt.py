"""A small GPT on this repository's own pages, with its stability margins in TensorBoard.

    python examples/gpt.py --steps 300 --logdir runs/gpt
    tensorboard --logdir runs/gpt        # then open its Custom Scalars page

AdamW is stable where the *preconditioned* sharpness is below (2 + 2 beta) / ((1 - beta) lr), which is
38/lr at beta = 0.9. The script also shows the plain sharpness, which has no limit under AdamW, and the
batch sharpness, the curvature of each batch along its own gradient.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stableopt

ROOT = Path(__file__).parents[1]


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, width)`` to the same shape."""
        q, k, v = self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """Logits ``(batch, time, vocabulary)`` of the next character; the head is tied to the embedding."""

    def __init__(
        self, vocabulary: int, context: int, width: int = 32, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits for ``ids`` ``(batch, time)``."""
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all characters of all samples."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def windows(ids: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets ``(len(starts), context)``, one character apart."""
    rows = starts.unsqueeze(1) + torch.arange(context + 1)
    return ids[rows[:, :-1]], ids[rows[:, 1:]]


def train(
    steps: int = 300,
    *,
    lr: float = 3e-3,
    batch_size: int = 16,
    context: int = 48,
    every: int = 50,
    logdir: str | None = None,
) -> list[stableopt.StabilityMargins]:
    """Train, print and return the margins, and write them to TensorBoard."""
    torch.manual_seed(0)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    characters = sorted(set(text))
    id_of = {character: index for index, character in enumerate(characters)}
    ids = torch.tensor([id_of[character] for character in text])

    model = GPT(len(characters), context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    probe = windows(ids, torch.linspace(0, len(ids) - context - 1, 32).long(), context)
    sinks = [] if logdir is None else [stableopt.TensorBoardSink(logdir)]
    with stableopt.StabilityMonitor(
        optimizer,
        model,
        loss_fn,
        probe,
        every=every,
        dataset_size=len(ids) - context,
        quantities=("sharpness", "preconditioned_sharpness", "batch_sharpness"),
        sinks=sinks,
    ) as monitor:
        measurements = 0
        for step in range(1, steps + 1):
            starts = torch.randint(len(ids) - context, (batch_size,))
            inputs, targets = windows(ids, starts, context)
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            if len(monitor.history) > measurements:
                measurements, margins = len(monitor.history), monitor.margins
                print(
                    f"step {step:4d}  loss {loss.item():.3f}  sharpness {margins.sharpness:8.2f}"
                    f"  preconditioned {margins.preconditioned_sharpness:9.0f}"
                    f" of {margins.preconditioned_sharpness_limit:.0f}"
                    f"  batch sharpness {margins.batch_sharpness:8.0f}  ({margins.method})"
                )
        return list(monitor.history)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--logdir", default="runs/gpt")
    options = parser.parse_args()
    train(options.steps, lr=options.lr, every=options.every, logdir=options.logdir)
