"""Products with Σ for the models that people train: the automatic way against vmap and the loop.

The unit is the time of one gradient over the same samples, measured in alternation. vmap and the loop
cost the same for each sample, so they are timed on two samples and scaled. Models of the package
transformers have random weights and about a million parameters; without the package they are skipped.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.perf.models.networks import Encoder, MobileNet, UNet
from benchmarks.perf.timing import Config, interleaved, report
from benchmarks.training.networks import resnet18
from stableopt.curvature import Hessian, NonUniformity, Problem

__all__ = ["CASES", "Case", "Config", "run"]

_FEW = 2
"""Number of samples on which the unstructured methods are timed."""

_WORDS, _LENGTH = 1000, 64


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        build: returns the model.
        batch: returns a number of samples, as the model's keyword arguments.
        n: number of samples.
        package: a package that the model requires, or ``None``.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    n: int = 16
    package: str | None = "transformers"


def _of_transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        package = import_module("transformers")
        model: nn.Module = getattr(package, name)(getattr(package, config)(**options))
        return model

    return build


def _resnet(norm: Callable[[int], nn.Module] | None = None) -> nn.Module:
    return _with_statistics(resnet18(0, norm=norm))


def _with_statistics(model: nn.Module) -> nn.Module:
    """Return an image classifier whose batch norms have running statistics."""
    model(torch.randn(64, 3, 32, 32))
    return _Classifier(model)


class _Classifier(nn.Module):
    """Returns a classifier's loss in the format of transformers' models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, **inputs: Tensor) -> Any:
        """Return an object with the loss."""
        [x] = inputs.values()
        return _Output(nn.functional.cross_entropy(self.model(x), labels))


@dataclass(frozen=True)
class _Output:
    loss: Tensor


def _words(n: int) -> dict[str, Tensor]:
    words = torch.randint(3, _WORDS, (n, _LENGTH))
    return {"input_ids": words, "labels": words}


def _images(size: int) -> Callable[[int], dict[str, Tensor]]:
    def batch(n: int) -> dict[str, Tensor]:
        labels = torch.randint(0, 10, (n,))
        return {"pixel_values": torch.randn(n, 3, size, size), "labels": labels}

    return batch


def _segmented(n: int) -> dict[str, Tensor]:
    """Return images with a class per pixel, and a border that the loss ignores."""
    inside, border = torch.randint(0, 10, (n, 28, 28)), nn.CrossEntropyLoss().ignore_index
    return {
        "pixel_values": torch.randn(n, 3, 32, 32),
        "labels": nn.functional.pad(inside, (2, 2, 2, 2), value=border),
    }


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": _WORDS}
_GPT2 = {**_SPECIAL, "n_positions": _LENGTH, "n_embd": 128, "n_layer": 4, "n_head": 4}
_WIDTHS = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 344,
}
_TEXT = {**_SPECIAL, **_WIDTHS, "max_position_embeddings": _LENGTH}
_T5 = {
    **_SPECIAL,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 344,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_SWIN = {"image_size": 64, "embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}
_CONVNEXT = {"hidden_sizes": [48, 96, 192], "depths": [2, 2, 2], "num_stages": 3}
_VIT = {**_WIDTHS, "image_size": 64, "patch_size": 8}


def _tied_and_untied(
    name: str, model: str, config: str, options: dict[str, Any]
) -> dict[str, Case]:
    """Return a language model with tied and with untied embeddings."""
    return {
        name + (" tied" if tied else " untied"): Case(
            _of_transformers(model, config, tie_word_embeddings=tied, **options), _words
        )
        for tied in (True, False)
    }


CASES: dict[str, Case] = {
    "ResNet-18 GN": Case(_resnet, _images(32), 8, None),
    "ResNet-18 BN": Case(lambda: _resnet(nn.BatchNorm2d), _images(32), 8, None),
    "MobileNet": Case(lambda: _with_statistics(MobileNet()), _images(32), package=None),
    "U-Net": Case(lambda: _Classifier(UNet()), _segmented, package=None),
    "encoder": Case(lambda: _Classifier(Encoder(_WORDS)), _words, package=None),
    **_tied_and_untied("GPT-2", "GPT2LMHeadModel", "GPT2Config", _GPT2),
    **_tied_and_untied("LLaMA", "LlamaForCausalLM", "LlamaConfig", _TEXT),
    **_tied_and_untied("BERT", "BertForMaskedLM", "BertConfig", _TEXT),
    "T5": Case(_of_transformers("T5ForConditionalGeneration", "T5Config", **_T5), _words),
    "ViT": Case(
        _of_transformers("ViTForImageClassification", "ViTConfig", num_labels=10, **_VIT),
        _images(64),
    ),
    "Swin": Case(
        _of_transformers("SwinForImageClassification", "SwinConfig", num_labels=10, **_SWIN),
        _images(64),
    ),
    "ConvNeXt": Case(
        _of_transformers(
            "ConvNextForImageClassification", "ConvNextConfig", num_labels=10, **_CONVNEXT
        ),
        _images(64),
    ),
}
"""The models by name."""


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time every method on every model, print and write the table; return its rows."""
    console = console or Console()
    rows = []
    for name, case in CASES.items():
        if case.package is not None and find_spec(case.package) is None:
            console.print(f"{name}: left out, as {case.package} is not installed")
            continue
        with console.status(name):
            rows.append({"model": name, **_row(config, case)})
    t = pd.DataFrame(rows)
    methods = {"Hv": "hessian", "ours": "auto", "vmap": "vmap", "loop": "loop"}
    columns = {
        **{"model": t.model, "d, M": t.d / 1e6, "gradient, ms": 1e3 * t.gradient},
        **{name: t[column] / t.gradient for name, column in methods.items()},
        **{"MiB, gradient": t.gradient_mib, "MiB, ours": t.mib},
    }
    title = "One product with the covariance of per-sample Hessians, in gradients"
    return report(config, console, "models", title, columns, rows)


def _row(config: Config, case: Case) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    model = case.build().eval().to(config.device)
    batch = {name: t.to(config.device) for name, t in case.batch(case.n).items()}
    few = {name: t[:_FEW] for name, t in batch.items()}
    problem, few_problem = (
        Problem.from_batch_loss(model, lambda model, batch: model(**batch).loss, [data])
        for data in (batch, few)
    )
    vector = torch.randn(problem.num_params, device=config.device)

    def gradient() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    gradient_mib = _peak_mib(gradient)
    # Before the operators fill their caches.
    ours = NonUniformity(problem)
    mib = _peak_mib(lambda: ours @ vector)
    hessian = Hessian(problem)
    peers = {"loop": NonUniformity(few_problem, method="loop")}
    try:
        by_vmap = NonUniformity(few_problem, method="vmap")
        _ = by_vmap @ vector
        peers["vmap"] = by_vmap
    except RuntimeError:  # vmap does not support the model
        pass
    timings = interleaved(
        {
            "gradient": gradient,
            "hessian": lambda: hessian @ vector,
            "auto": lambda: ours @ vector,
            **{
                method: (lambda operator=operator: operator @ vector)
                for method, operator in peers.items()
            },
        },
        repeats=config.repeats,
        device=config.device,
        clock=config.clock,
    )
    medians = {"vmap": float("nan")}
    medians |= {name: timing.median for name, timing in timings.items()}
    for method in peers:
        medians[method] *= case.n / min(_FEW, case.n)
    expected = peers["loop"] @ vector
    image = NonUniformity(few_problem) @ vector
    return {
        "d": problem.num_params,
        "n": case.n,
        "method": ours.method,
        "few": _FEW,
        **medians,
        "mib": mib,
        "gradient_mib": gradient_mib,
        "difference": float((image - expected).norm() / expected.norm()),
    }


_REFERENCED, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _peak_mib(function: Callable[[], object]) -> float:
    """Return the rise of the process's peak memory during a call, or NaN if it cannot be read."""
    gc.collect()

    def read(field: str) -> float:
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
        _REFERENCED.write_text("5")  # resets the peak
        before = read("VmRSS")
    except (OSError, AttributeError):
        function()
        return float("nan")
    function()
    return read("VmHWM") - before
