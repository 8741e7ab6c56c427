r"""Which layer is at the edge
==========================

Each measurement of the sharpness says in which layers its top eigenvector lies. The quantity
``"layers"`` adds what each layer is by itself: its sharpness against the limit, and its mean curvature
:math:`\mathrm{tr}(H_{bb})/\#b`. Here a small transformer reads digits row by row, with AdamW.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import stableopt

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x = torch.tensor(images[:200], dtype=torch.float32).view(-1, 8, 8) / 16
y = torch.tensor(digits[:200])
loss_fn = nn.CrossEntropyLoss()


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        """Return the hidden states ``(n, rows, width)``."""
        h = self.norm1(x)
        scores = self.query(h) @ self.key(h).transpose(1, 2) / h.shape[-1] ** 0.5
        x = x + self.output(scores.softmax(-1) @ self.value(h))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks between an embedding of the rows and a head."""

    def __init__(self, width=16):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        """Return the logits ``(n, 10)``."""
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)).mean(1))


# %%
# The shares come with every measurement, at no further product. Kinds of layers by themselves are
# measured once, at the edge: a mapping gives blocks names of their own.

KINDS = {
    "embeddings": ["embed", "position"],
    "query, key": ["blocks.*.query", "blocks.*.key"],
    "feed-forward": ["blocks.*.up", "blocks.*.down"],
    "value, output": ["blocks.*.value", "blocks.*.output"],
    "norms": ["blocks.*.norm?", "norm"],
}
model = Transformer()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
with stableopt.StabilityMonitor(
    optimizer, model, loss_fn, (x, y), every=5, batch_size=len(x)
) as monitor:
    for _ in range(100):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        if monitor.step == 30:
            at_the_edge = stableopt.measure(
                model,
                loss_fn,
                (x, y),
                optimizer=optimizer,
                quantities=("layers",),
                blocks=KINDS,
                tol=0.03,
            )

figure = stableopt.plot.layers(
    monitor.history,
    marks=[(30, "at the edge")],
    title="Where the top eigenvector lies",
)

# %%
# The whole model is at its limit, and no kind of layer alone is near it: the unstable direction moves
# all of them together.

print(f"step 30: {at_the_edge.edge_ratio:.2f} of the limit")
print(at_the_edge.layers)
for kind in at_the_edge.layers:
    print(f"{kind.name:14} {kind.mean_curvature:8.4f} ± {kind.mean_curvature_error:.4f}")

# %%
# Wang et al. (ICML 2025, arXiv:2502.19002) found in language models that the mean curvature tr/size
# grows in the order embeddings, query and key, feed-forward, value and output, norms, over orders of
# magnitude. Here the three in the middle have that order. The embedding, a dense layer of pixels and no
# table of rare words, is the sharpest, and the estimate for the norms, 160 parameters, is uncertain.
