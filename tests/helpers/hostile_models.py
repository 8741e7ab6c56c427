"""Models, losses and batches that a measurement meets in the wild, each as small as it can be.

Every builder is called under a default dtype of float64 with a fixed seed, so that two calls give the
same :class:`Setting`: one to measure, and one for the reference, which may do with it what it likes.
"""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from oracles import SineOnce
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, rnn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

__all__ = ["MEASURED", "REFUSED", "Setting"]

MSE = nn.MSELoss()


@dataclass
class Setting:
    """One thing to measure.

    Attributes:
        model: the model as the user holds it.
        loss: ``loss(outputs, targets)``, or ``loss(model, batch)`` where ``whole`` is set.
        data: the data as the user passes them.
        batches: the same data as a list of batches, for the reference.
        whole: whether the loss takes the model and a whole batch.
        params: which parameters count; all trainable ones if ``None``.
        options: of ``Problem``.
        around: the context in which it is measured.
    """

    model: nn.Module
    loss: Any
    data: Any
    batches: list[Any] = field(default_factory=list)
    whole: bool = False
    params: Callable[[nn.Module], list[nn.Parameter]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], Any] = contextlib.nullcontext

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the loss of one batch as a user's training loop computes it."""
        if self.whole:
            return self.loss(self.model, batch)
        x, y = batch
        return self.loss(self.model(x), y)

    def read(self) -> list[Any]:
        """Return the batches of the data."""
        return self.batches or [self.data]


MEASURED: dict[str, tuple[Callable[[], Setting], str]] = {}
"""Builder, and what ``margins.method`` must be, by name."""

REFUSED: dict[str, tuple[Callable[[], Setting], str]] = {}
"""Builder, and what the error, or the reason of the failure, must match."""


def measured(name: str, method: str = "double backward") -> Callable[..., Any]:
    """Enter a builder whose curvature can be had."""

    def enter(build: Callable[[], Setting]) -> Callable[[], Setting]:
        assert name not in MEASURED
        MEASURED[name] = (build, method)
        return build

    return enter


def refused(name: str, match: str) -> Callable[..., Any]:
    """Enter a builder whose curvature cannot be had, with the reason that must be given."""

    def enter(build: Callable[[], Setting]) -> Callable[[], Setting]:
        assert name not in REFUSED
        REFUSED[name] = (build, match)
        return build

    return enter


def pair(n: int = 6, d: int = 3, out: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randn(n, out)


def sequences(n: int = 3, t: int = 3, d: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, t, d), torch.randn(n, t, d)


def tokens(n: int = 5, t: int = 4, vocabulary: int = 6) -> Tensor:
    return torch.randint(vocabulary, (n, t))


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *between, nn.Linear(4, 2))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# -- attention -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention by torch's own fused function, with dropout in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.project(x).chunk(3, dim=-1))
        dropout = 0.2 if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return out.squeeze(1)


@measured("scaled-dot-product attention", "double backward, math attention")
def _sdpa() -> Setting:
    return Setting(Attention(), MSE, sequences())


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.need_weights = False

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


@measured("multi-head attention", "double backward, math attention")
def _multi_head() -> Setting:
    return Setting(SelfAttention(), MSE, sequences())


@measured("transformer encoder layer", "double backward, math attention")
def _encoder() -> Setting:
    layer = nn.TransformerEncoderLayer(4, 2, 2, dropout=0.1, batch_first=True, activation="gelu")
    return Setting(layer, MSE, sequences())


# -- compiled, checkpointed, autocast ----------------------------------------------------------------


@measured("compiled", "double backward, uncompiled")
def _compiled() -> Setting:
    return Setting(torch.compile(mlp(), backend="eager"), MSE, pair())


@measured("compiled in place", "double backward, uncompiled")
def _compiled_in_place() -> Setting:
    model = mlp()
    model.compile(backend="aot_eager")
    return Setting(model, MSE, pair())


@measured("a compiled part", "double backward, uncompiled")
def _compiled_part() -> Setting:
    inner = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), backend="eager")
    return Setting(mlp(inner), MSE, pair())


@measured("a compiled loss")
def _compiled_loss() -> Setting:
    loss = torch.compile(lambda z, y: (z - y).square().mean(), backend="eager")
    return Setting(mlp(), loss, pair())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def block(self, z: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.tanh(z)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        for _ in range(2):
            z = checkpoint(self.block, z, use_reentrant=self.reentrant)
        return self.last(z)


@measured("activation checkpointing", "double backward, without checkpointing")
def _checkpointed() -> Setting:
    return Setting(Checkpointed(reentrant=False), MSE, pair())


@measured("reentrant checkpointing", "double backward, without checkpointing")
def _reentrant() -> Setting:
    return Setting(Checkpointed(reentrant=True), MSE, pair())


class Autocast(nn.Module):
    """Casts for itself, so that it stands in half precision whatever is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@measured("autocast in the model", "double backward, without autocast")
def _autocast() -> Setting:
    return Setting(Autocast(), MSE, pair())


@measured("autocast around the measurement")
def _autocast_around() -> Setting:
    return Setting(mlp(), MSE, pair(), around=lambda: torch.autocast("cpu", dtype=torch.bfloat16))


@measured("half precision measured in double", "double backward, in float64")
def _half_in_double() -> Setting:
    x, y = pair()
    model = mlp(nn.BatchNorm1d(4).eval()).bfloat16()
    x, y = x.bfloat16(), y.bfloat16()
    return Setting(model, MSE, (x, y), options={"dtype": torch.float64})


# -- recurrent -----------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], hidden: int = 2, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(2, hidden, batch_first=True, **options)
        self.head = nn.Linear(hidden * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@measured("LSTM")
def _lstm() -> Setting:
    return Setting(Recurrent(nn.LSTM), MSE, sequences(3, 3, 2))


@measured("GRU")
def _gru() -> Setting:
    return Setting(Recurrent(nn.GRU), MSE, sequences(3, 3, 2))


@measured("deep bidirectional LSTM with dropout")
def _deep_lstm() -> Setting:
    model = Recurrent(nn.LSTM, hidden=1, num_layers=2, bidirectional=True, dropout=0.3)
    return Setting(model, MSE, sequences(2, 2, 2))


class Packed(Recurrent):
    def forward(self, x: dict[str, Tensor]) -> Tensor:
        packed = rnn.pack_padded_sequence(
            x["rows"], x["lengths"].cpu(), batch_first=True, enforce_sorted=False
        )
        _, (hidden, _) = self.rnn(packed)
        return self.head(hidden[-1])


@measured("packed sequences")
def _packed() -> Setting:
    x = {"rows": torch.randn(4, 5, 2), "lengths": torch.tensor([5, 2, 3, 4])}
    return Setting(Packed(nn.LSTM), MSE, (x, torch.randn(4, 2)))


class Stateful(nn.Module):
    """Carries its hidden state from call to call, as truncated backpropagation through time does."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)
        self.hidden: Tensor | None = None
        self.count = torch.zeros(())
        self.seen: list[float] = []
        self.latest: deque[float] = deque([1.0], maxlen=1)
        self.statistics = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.cell(x, None)
        self.count += 1
        self.seen.append(float(x.sum()))
        self.latest.append(float(x.sum()))
        self.statistics["calls"] += 1
        return self.head(self.hidden)


@measured("state in attributes, lists and plain tensors")
def _stateful() -> Setting:
    return Setting(Stateful(), MSE, pair())


# -- parameters ----------------------------------------------------------------------------------


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


@measured("tied embeddings")
def _tied() -> Setting:
    ids = tokens()
    return Setting(TiedLanguageModel(), next_token_loss, (ids, ids.roll(-1, 1)))


@measured("frozen parameters")
def _frozen() -> Setting:
    model = mlp(nn.Linear(4, 4), nn.Tanh())
    model[0].requires_grad_(False)
    return Setting(model, MSE, pair())


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@measured("unused parameters")
def _unused() -> Setting:
    return Setting(WithUnused(), MSE, pair())


@measured("chosen parameters")
def _chosen() -> Setting:
    return Setting(mlp(), MSE, pair(), params=lambda model: list(model[2].parameters()))


class LowRank(nn.Module):
    """A frozen layer with an adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 2).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 3))
        self.up = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@measured("low-rank adapters")
def _low_rank() -> Setting:
    return Setting(LowRank(), MSE, pair())


class Collections(nn.Module):
    """Lists and dictionaries of parameters, scalars, and one without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2)])
        self.by_name = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(0.7))})
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(x * self.gains[0]) * self.gains[1]
        return self.by_name["scale"] * z[:, :2] + self.empty.sum()


@measured("parameter lists, scalars and empty tensors")
def _collections() -> Setting:
    return Setting(Collections(), MSE, pair())


@measured("weight norm", "central differences")
def _weight_norm() -> Setting:
    return Setting(parametrizations.weight_norm(nn.Linear(3, 2)), MSE, pair())


@measured("spectral norm")
def _spectral_norm() -> Setting:
    return Setting(mlp(parametrizations.spectral_norm(nn.Linear(4, 4))), MSE, pair())


@measured("orthogonal parametrisation")
def _orthogonal() -> Setting:
    return Setting(mlp(parametrizations.orthogonal(nn.Linear(4, 4))), MSE, pair())


@measured("pruned weights")
def _pruned() -> Setting:
    model = mlp()
    prune.random_unstructured(model[0], "weight", amount=0.4)
    return Setting(model, MSE, pair())


# -- batches and outputs of all forms ----------------------------------------------------------------


class Reads(nn.Module):
    """Takes its inputs by name, and returns what it is told to."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        self.inner, self.wrap = mlp(), wrap

    def forward(self, rows: Tensor, scale: Tensor) -> Any:
        return self.wrap(self.inner(rows) * scale)


def named_rows() -> dict[str, Any]:
    rows, targets = pair()
    return {"rows": rows, "scale": torch.rand(6, 1), "targets": targets, "name": "a batch"}


@measured("a dictionary as a batch")
def _dictionary() -> Setting:
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return MSE(model(batch["rows"], batch["scale"]), batch["targets"])

    return Setting(Reads(), loss, named_rows(), whole=True)


class TakesDictionary(Reads):
    def forward(self, x: dict[str, Tensor]) -> Any:
        return super().forward(x["rows"], x["scale"])


@measured("a dictionary as the inputs")
def _dictionary_inputs() -> Setting:
    batch = named_rows()
    targets = batch.pop("targets")
    return Setting(TakesDictionary(), MSE, (batch, targets))


@dataclass
class Output:
    logits: Tensor
    extra: None = None


@measured("a model that returns a dictionary")
def _returns_dictionary() -> Setting:
    batch = named_rows()
    targets = batch.pop("targets")
    model = TakesDictionary(lambda z: {"logits": z})
    return Setting(model, lambda out, y: MSE(out["logits"], y), (batch, targets))


@measured("a model that returns a dataclass")
def _returns_dataclass() -> Setting:
    batch = named_rows()
    targets = batch.pop("targets")
    model = TakesDictionary(Output)
    return Setting(model, lambda out, y: MSE(out.logits, y), (batch, targets))


@dataclass
class Rows:
    rows: Tensor
    targets: Tensor
    name: str = "a batch"


@measured("a dataclass as a batch")
def _dataclass_batch() -> Setting:
    def loss(model: nn.Module, batch: Rows) -> Tensor:
        return MSE(model(batch.rows), batch.targets)

    return Setting(mlp(), loss, Rows(*pair()), whole=True)


class NamedRows(NamedTuple):
    rows: Tensor
    targets: Tensor


@measured("named tuples as batches")
def _named_tuples() -> Setting:
    def loss(model: nn.Module, batch: NamedRows) -> Tensor:
        return MSE(model(batch.rows), batch.targets)

    batches = [NamedRows(*pair()), NamedRows(*pair(2))]
    return Setting(mlp(), loss, batches, batches, whole=True)


class Encoding(UserDict):
    """A dictionary whose entries are attributes too, as tokenizers return."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class LanguageModelOutput(OrderedDict):
    """A dictionary whose entries are attributes too, as language models return."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class WithOwnLoss(nn.Module):
    """Computes its loss from the labels it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TiedLanguageModel()

    def forward(self, input_ids: Tensor, labels: Tensor) -> LanguageModelOutput:
        logits = self.inner(input_ids)
        return LanguageModelOutput(loss=next_token_loss(logits, labels), logits=logits)


@measured("a loss inside the model")
def _own_loss() -> Setting:
    ids = tokens()
    batch = Encoding(input_ids=ids, labels=ids.roll(-1, 1))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch.input_ids, labels=batch.labels).loss

    return Setting(WithOwnLoss(), loss, batch, whole=True)


@measured("several inputs and targets")
def _several() -> Setting:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = mlp(), nn.Linear(2, 2)

        def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            z = self.left(x[0])
            return z, self.right(torch.tanh(z) * x[1])

    def loss(out: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
        return MSE(out[0], y[0]) + F.l1_loss(out[1], y[1])

    (x, y), (_, other) = pair(), pair()
    batches = [((x, y), (y, other))]
    return Setting(Two(), loss, batches, batches)


@measured("a ragged loader")
def _ragged() -> Setting:
    x, y = pair(7)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    return Setting(mlp(), MSE, loader, [(x, y)])


class Stream(IterableDataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(self.x, self.y, strict=True)))


@measured("a stream that can be read again")
def _stream() -> Setting:
    x, y = pair(5)
    return Setting(mlp(), MSE, DataLoader(Stream(x, y), batch_size=2), [(x, y)])


class Augmented(Dataset):
    """Draws anew at every look, so that no two readings agree by themselves."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index] + 0.0 * torch.rand(2) * random.random()


@measured("a data set that draws random numbers")
def _augmented() -> Setting:
    x, y = pair()
    return Setting(mlp(), MSE, Augmented(x, y), [(x, y)])


@measured("inputs that ask for gradients")
def _inputs_with_gradients() -> Setting:
    x, y = pair()
    return Setting(mlp(), MSE, (x.requires_grad_(), y))


# -- layers ----------------------------------------------------------------------------------------


@measured("batch norm in eval mode")
def _batch_norm() -> Setting:
    norm = nn.BatchNorm1d(4)
    with torch.no_grad():
        norm(3 + 2 * torch.randn(50, 4))
    return Setting(mlp(norm), MSE, pair())


@measured("batch norm by batch statistics", "double backward, batch statistics")
def _batch_statistics() -> Setting:
    setting = Setting(mlp(nn.BatchNorm1d(4)), MSE, pair(), options={"batch_statistics": True})
    setting.model[2].train()
    return setting


@measured("batch statistics of chunks", "double backward, batch statistics")
def _batch_statistics_of_chunks() -> Setting:
    options = {"batch_statistics": True, "chunk_size": 3}
    x, y = pair(6)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    return Setting(mlp(nn.BatchNorm1d(4)), MSE, (x, y), batches, options=options)


@measured("group, layer and instance norm")
def _norms() -> Setting:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.GroupNorm(2, 2),
        nn.Softplus(),
        nn.InstanceNorm2d(2, affine=True),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 2),
    )
    return Setting(model, MSE, (torch.randn(3, 1, 4, 4), torch.randn(3, 2)))


@measured("convolutions with max-pooling and in-place ReLU")
def _convolutions() -> Setting:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    return Setting(model, MSE, (torch.randn(3, 1, 4, 4), torch.randn(3, 2)))


class Noise(nn.Module):
    """Draws from every generator there is, one of its own included, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(5)
        self.of_numpy = np.random.default_rng(5)
        self.of_python = random.Random(5)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape[1], generator=self.own) + torch.rand(x.shape[1])
        noise = noise + float(self.of_numpy.random()) + self.of_python.random()
        return x + 0.0 * (noise + random.random() + float(np.random.rand()))  # noqa: NPY002


@measured("dropout, and modules that draw random numbers")
def _noise() -> Setting:
    return Setting(mlp(nn.Dropout(0.5), Noise(), nn.AlphaDropout(0.2)), MSE, pair())


@measured("embedding bags with sparse gradients", "central differences")
def _sparse() -> Setting:
    model = nn.Sequential(nn.EmbeddingBag(6, 4, sparse=True), nn.Tanh(), nn.Linear(4, 2))
    return Setting(model, MSE, (tokens(), torch.randn(5, 2)))


class Experts(nn.Module):
    """Sends each sample to one of two experts: control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(3, 2), nn.ModuleList([mlp(), mlp()])

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return share.unsqueeze(1) * out


@measured("a mixture of experts")
def _experts() -> Setting:
    return Setting(Experts(), MSE, pair())


class Energy(nn.Module):
    """Returns the gradient of an energy in its inputs, as force fields do."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@measured("a gradient inside the model")
def _energy() -> Setting:
    x = torch.randn(5, 3)
    return Setting(Energy(), MSE, (x, x.sin()))


class Laplacian(nn.Module):
    """Uses torch.func inside its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.func.jacrev(lambda at: self.net(at).squeeze(-1))
        return torch.vmap(slope)(x)


@measured("torch.func inside the model")
def _laplacian() -> Setting:
    x = torch.randn(5, 3)
    return Setting(Laplacian(), MSE, (x, x.sin()))


@measured("a scripted module")
def _scripted() -> Setting:
    return Setting(torch.jit.script(mlp()), MSE, pair())


@measured("a traced graph")
def _traced() -> Setting:
    return Setting(torch.fx.symbolic_trace(mlp()), MSE, pair())


@measured("data-parallel")
def _parallel() -> Setting:
    return Setting(nn.DataParallel(mlp()), MSE, pair())


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SineOnce.apply(x)


@measured("a kernel of one's own that is differentiable once", "central differences")
def _once() -> Setting:
    return Setting(mlp(Once()), MSE, pair())


class DetachedSine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.cosine = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.cosine


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return DetachedSine.apply(x)


@measured("a backward whose own derivative is silently wrong", "central differences")
def _silent() -> Setting:
    return Setting(mlp(Silent()), MSE, pair())


@measured("connectionist temporal classification", "central differences")
def _ctc() -> Setting:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).log_softmax(-1)

    def loss(logs: Tensor, y: Tensor) -> Tensor:
        size, steps = logs.shape[:2]
        lengths = torch.full((size,), steps), torch.full((size,), y.shape[1])
        # Its mean divides by the lengths of the targets, which are all the same here.
        return F.ctc_loss(logs.transpose(0, 1), y, *lengths)

    return Setting(Speech(), loss, (torch.randn(3, 6, 4), torch.randint(1, 4, (3, 2))))


@measured("inference mode around the measurement")
def _inference() -> Setting:
    return Setting(mlp(), MSE, pair(), around=torch.inference_mode)


@measured("no gradients around the measurement")
def _no_grad() -> Setting:
    return Setting(mlp(), MSE, pair(), around=torch.no_grad)


@measured("user hooks on the modules")
def _hooks() -> Setting:
    model = mlp()
    model[1].register_forward_hook(lambda module, args, out: out * 1.5)
    model[0].weight.register_hook(lambda grad: grad * 1.0)
    return Setting(model, MSE, pair())


@measured("a train() that does more than set the mode")
def _own_train() -> Setting:
    class Own(nn.Sequential):
        def train(self, mode: bool = True) -> Own:
            raise AssertionError("a measurement must not call train() or eval()")

    return Setting(Own(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), MSE, pair())


@measured("a recurrent weight used many times")
def _reused() -> Setting:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.step(x))
            return self.head(x)

    return Setting(Unrolled(), MSE, pair())


@measured("a loss with parameters that are frozen")
def _loss_module() -> Setting:
    class Perceptual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)).requires_grad_(False)

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return MSE(self.features(z), self.features(y))

    return Setting(mlp(), Perceptual(), pair())


# -- refused ---------------------------------------------------------------------------------------


@refused("batch norm without running statistics", "normalises by batch statistics even in eval")
def _no_statistics() -> Setting:
    return Setting(mlp(nn.BatchNorm1d(4, track_running_stats=False)), MSE, pair())


@refused("lazy layers", "no shape yet: run the lazy model once")
def _lazy() -> Setting:
    return Setting(nn.Sequential(nn.LazyLinear(2)), MSE, pair())


@refused("complex parameters", "has dtype torch.complex128")
def _complex() -> Setting:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex128) @ self.weight).abs()

    return Setting(Waves(), MSE, pair())


@refused("half precision that nobody chose for", "bfloat16.*pass dtype=torch.float32")
def _half() -> Setting:
    x, y = pair()
    return Setting(mlp().bfloat16(), MSE, (x.bfloat16(), y.bfloat16()))


@refused("mixed precision of parameters", "expected one dtype and one device")
def _mixed() -> Setting:
    model = mlp()
    model[2].float()
    return Setting(model, MSE, pair())


@refused("no trainable parameters", "no trainable parameters")
def _none_trainable() -> Setting:
    return Setting(mlp().requires_grad_(False), MSE, pair())


@refused("parameters without data", "meta")
def _meta() -> Setting:
    with torch.device("meta"):
        model = mlp()
    return Setting(model, MSE, pair())


@refused("a sum in place of a mean", "not a mean over samples.*a sum")
def _sum() -> Setting:
    return Setting(mlp(), nn.MSELoss(reduction="sum"), pair())


@refused("a loss for each sample", "expected a scalar")
def _unreduced() -> Setting:
    return Setting(mlp(), nn.MSELoss(reduction="none"), pair())


@refused("a contrastive loss", "not a mean over samples")
def _contrastive() -> Setting:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    return Setting(mlp(), loss, pair())


@refused("a loss that is a number", "returned float")
def _number() -> Setting:
    return Setting(mlp(), lambda z, y: float(MSE(z, y)), pair())


@refused("a forward pass without gradients", "does not depend on any of the parameters")
def _detached() -> Setting:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    return Setting(Blind(), MSE, pair())


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@refused("gradient reversal", "not the derivative of the loss")
def _reversal() -> Setting:
    class Reversal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Reversed.apply(x)

    return Setting(mlp(Reversal()), MSE, pair())


@refused("a target that is detached", "not the derivative of the loss")
def _stop_gradient() -> Setting:
    return Setting(mlp(), lambda z, y: MSE(z, z.flip(-1).detach()) + MSE(z, y), pair())


@refused("a step function", "does not depend|not the derivative|zero")
def _sign() -> Setting:
    class Sign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) > 0).double()

    return Setting(Sign(), MSE, pair())


@refused("a loss that is not finite", "not finite")
def _infinite() -> Setting:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return Setting(model, MSE, pair())


@refused("an iterator that can be read once", "read only once")
def _iterator() -> Setting:
    return Setting(mlp(), MSE, iter([pair()]))


@refused("no data", "empty")
def _empty() -> Setting:
    return Setting(mlp(), MSE, [])


@refused("batches of arrays", "torch.as_tensor")
def _arrays() -> Setting:
    x, y = pair()
    return Setting(mlp(), MSE, [(x.numpy(), y.numpy())])


@refused("inputs and targets of different lengths", "same leading dimension")
def _lengths() -> Setting:
    x, y = pair()
    return Setting(mlp(), MSE, (x, y[:4]))


@refused("dictionaries where pairs are expected", "from_batch_loss")
def _dictionaries_for_pairs() -> Setting:
    return Setting(mlp(), MSE, [named_rows()])


@refused("a forward pass that raises", "no such thing")
def _raises() -> Setting:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            torch.rand(1)
            self.inner(x)
            raise LookupError("no such thing")

    return Setting(Raises(), MSE, pair())


@refused("a model that is no module", "expected a torch.nn.Module")
def _function() -> Setting:
    return Setting(torch.sin, MSE, pair())  # type: ignore[arg-type]
