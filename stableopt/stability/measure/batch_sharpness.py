r"""`batch_sharpness`: the sharpness of mini-batches along their own gradients, and its limit.

Both published definitions come from the same products. With :math:`q_B = g_B^\top H_B g_B`,

.. math:: \frac{E[q_B]}{E\|g_B\|^2}, \qquad E\Big[\frac{q_B}{\|g_B\|^2}\Big],

the ratio of means and the mean of ratios (Andreyev & Beneventano, *Edge of Stochastic Stability*,
arXiv:2412.20553).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import positive, whole
from stableopt.curvature import Hessian, NonFiniteError, Problem
from stableopt.curvature.problem.data.batches import map_tensors
from stableopt.curvature.problem.over_chunks import mean_over_chunks
from stableopt.stability.rules.limits import LinearStep

__all__ = [
    "BatchSharpness",
    "batch_mean",
    "batch_sharpness",
    "batch_sharpness_limit",
    "random_batches",
]

NUM_BATCHES = 64
"""Default of the largest number of batches to average."""

_FEWEST = 8
"""Fewest batches before an early stop: the standard error of fewer is itself off by a third."""


@dataclass(frozen=True)
class BatchSharpness:
    """The batch sharpness, an average over batches.

    Attributes:
        value: the ratio of means; ``None`` if all gradients are zero.
        standard_error: standard error of ``value``, from the spread of the batches; 0 for one batch.
        batches: number of batches averaged.
        mean_of_ratios: the mean of the batches' ratios; ``None`` if a gradient is zero.
        mean_of_ratios_error: the standard error of ``mean_of_ratios``.
        converged: whether ``rel_error`` was reached; true without it.
    """

    value: float | None
    standard_error: float
    batches: int
    mean_of_ratios: float | None = None
    mean_of_ratios_error: float = 0.0
    converged: bool = True


def batch_sharpness(
    problem: Problem,
    batch_size: int,
    *,
    num_batches: int = NUM_BATCHES,
    rel_error: float | None = None,
    step: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> BatchSharpness:
    r"""Return :math:`E[g_B^\top H_B g_B]/E\|g_B\|^2`, over batches B drawn without replacement.

    A step of plain SGD along :math:`-g_B` lowers the quadratic model of its own batch while this is
    below :math:`2/\eta`, where runs at the edge of stability settle (Andreyev & Beneventano, *Edge of
    stochastic stability*, 2024). Near a minimum with H_i of rank one it relates to mean-square
    stability; for the full batch it is the sharpness along the gradient. With momentum the limit is
    :func:`~stableopt.stability.batch_sharpness_limit`.

    Args:
        problem: the problem; its weight decay is ignored.
        batch_size: samples in a batch, at most those of the problem.
        num_batches: the largest number of batches to average, cut from random permutations of the
            samples. One permutation suffices if the order does not matter: for the full batch, and for
            ``batch_size`` 1 if there are batches for all samples.
        rel_error: stop once the standard error is below this share of the value, after 8 batches at the
            earliest; by default all batches are drawn.
        step: maps the gradient ``(d,)`` of a batch to the direction s of its step, such as ``lambda g:
            0.9 * buffer + g`` for momentum. The result is then the momentum form,
            :math:`E[s^\top H_Bs]/E[s^\top g_B]`: a step along :math:`-s` lowers the quadratic
            model of its batch below :math:`2/\eta` (Andreyev et al., arXiv:2604.14108).
        seed: seed of the permutations, which have their own generator.

    ``value`` averages numerator and denominator separately; ``mean_of_ratios`` is the other definition.
    Each batch costs one Hessian-vector product over its own samples.

    Raises:
        ValueError: for a batch size above the problem's number of samples, arguments out of range, or
            a problem with batch statistics.
        NonFiniteError: if a gradient or a product is not finite.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()     # f_i = x_i^2 w^2, H_i = 2 and 8
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1).double()))
    >>> found = batch_sharpness(problem, 1)
    >>> round(found.value, 6), round(found.mean_of_ratios, 6)   # (2^3 + 8^3) / (2^2 + 8^2), (2 + 8) / 2
    (7.647059, 5.0)
    """
    if rel_error is not None:
        rel_error = positive("rel_error", rel_error)
    hessian, terms = Hessian(problem), []
    with problem.evaluation():
        for parts in random_batches(problem, batch_size, num_batches, seed):
            terms.append(_along_step(hessian, parts, step))
            if not all(map(math.isfinite, terms[-1])):
                raise NonFiniteError(
                    "the gradient of a batch, or its Hessian-vector product, is not finite"
                )
            may_stop = rel_error is not None and len(terms) >= _FEWEST
            if may_stop and _average(terms, rel_error).converged:
                break
    return _average(terms, rel_error)


def _average(terms: list[tuple[float, float]], rel_error: float | None) -> BatchSharpness:
    """Average the pairs of ``s @ H @ s`` and ``s @ g``, one for each batch."""
    curvatures, slopes = torch.tensor(terms, dtype=torch.float64, device="cpu").T
    count, mean_slope = len(terms), float(slopes.mean())
    if mean_slope == 0:
        return BatchSharpness(None, 0.0, count)
    value = float(curvatures.mean()) / mean_slope
    spread = float((curvatures - value * slopes).std()) if count > 1 else 0.0
    error = abs(spread / mean_slope) / math.sqrt(count)
    mean_of_ratios, mean_of_ratios_error = None, 0.0
    if bool((slopes != 0).all()):
        ratios = curvatures / slopes
        mean_of_ratios = float(ratios.mean())
        if count > 1:
            mean_of_ratios_error = float(ratios.std()) / math.sqrt(count)
    converged = rel_error is None or error <= rel_error * abs(value)
    return BatchSharpness(value, error, count, mean_of_ratios, mean_of_ratios_error, converged)


def batch_sharpness_limit(rule: LinearStep, sharpness: float | None) -> float | None:
    r"""Return the largest batch sharpness at which a step is stable in mean square in one dimension.

    A curvature h that varies from batch to batch, with mean a, is stable up to
    :math:`E[h^2]/E[h] = a + \sigma^2_{\max}(a)/a`, where :math:`\sigma^2_{\max}` is the square of
    :func:`~stableopt.stability.max_non_uniformity` at unit noise. For momentum :math:`\beta` it is

    .. math:: \frac{2(1-\beta)}{\eta} + \frac{2\beta a}{1+\beta},

    which is :math:`2/\eta` without momentum. It lies between :math:`2(1-\beta)/\eta`, where small
    batches settle, and :math:`2(1+\beta)/\eta`, where large ones do. It is a guide, not a bound: in
    one dimension neither definition of batch sharpness is :math:`E[h^2]/E[h]`.

    Args:
        rule: the coefficients of the step, such as ``UpdateRule.linear_step``.
        sharpness: the sharpness a, clipped at the rule's own limit; may be ``None`` without momentum.

    Returns:
        The limit; ``None`` if it depends on the sharpness, and that is ``None`` or not above 0.

    >>> round(batch_sharpness_limit(LinearStep(0.1, momentum=0.9), 10.0), 6)
    11.473684
    >>> batch_sharpness_limit(LinearStep(0.1), None)
    20.0
    """
    if rule.lr == 0:
        return math.inf
    if sharpness is None and rule == LinearStep(rule.lr):
        return 2 / rule.lr
    if sharpness is None or not sharpness > 0:
        return None
    a = min(sharpness, rule.max_sharpness)
    return a + rule.max_non_uniformity(1.0, a) ** 2 / a if a > 0 else None


def random_batches(
    problem: Problem, batch_size: int, num_batches: int, seed: int
) -> Iterator[list[tuple[Any, int]]]:
    """Yield random batches, each as a list of this rank's samples: ``(samples, size)`` per chunk.

    Iterate within :meth:`Problem.evaluation`. Errors are those of :func:`batch_sharpness`.
    """
    batch_size, n = whole("batch_size", batch_size), problem.num_samples
    if batch_size > n:
        raise ValueError(
            f"batch_size={batch_size} is above the {n} samples of the problem, from which batches are"
            " drawn; pass at most that many"
        )
    problem.check_samples("the batch sharpness")
    generator = torch.Generator().manual_seed(whole("seed", seed, least=0))
    num_batches, ranks = whole("num_batches", num_batches), problem.ranks
    first_row = sum(ranks.all_gather_object(problem.own_samples)[: ranks.rank])
    chunks = ranks.raise_together(lambda: list(problem.chunks()))
    for rows in _batch_rows(n, batch_size, num_batches, generator):
        yield list(_samples(chunks, rows - first_row))


def _batch_rows(
    n: int, batch_size: int, num_batches: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield the row indices of each batch, sorted."""
    per_order = n // batch_size
    one_order_suffices = batch_size in (1, n) and per_order <= num_batches
    remaining = per_order if one_order_suffices else num_batches
    while remaining > 0:
        order = torch.randperm(n, generator=generator, device="cpu")
        for number in range(min(per_order, remaining)):
            yield order[number * batch_size : (number + 1) * batch_size].sort().values
        remaining -= per_order


def _samples(chunks: list[tuple[Any, int]], rows: Tensor) -> Iterator[tuple[Any, int]]:
    """Yield the samples ``rows`` of this rank chunk by chunk, as ``(samples, size)``."""
    start = 0
    for batch, size in chunks:
        in_chunk = rows[(rows >= start) & (rows < start + size)] - start
        if len(in_chunk):
            yield _rows_of(batch, in_chunk), len(in_chunk)
        start += size


def _rows_of(batch: Any, rows: Tensor) -> Any:
    return map_tensors(lambda t: t.index_select(0, rows.to(t.device)) if t.dim() else t, batch)


def batch_mean(
    problem: Problem,
    term: Callable[[Any, int], tuple[Tensor | None, ...]],
    parts: list[tuple[Any, int]],
) -> Tensor:
    """Return the mean ``(d,)`` of ``term`` over a batch, whose samples on this rank are ``parts``."""
    total = torch.zeros(problem.num_params, dtype=problem.dtype, device=problem.device)

    def add(batch: Any, size: int) -> None:
        total.add_(problem.flatten(term(batch, size)), alpha=size)

    return mean_over_chunks(problem, [total], add, parts, evaluating=True)[0]


def _along_step(
    hessian: Hessian, parts: list[tuple[Any, int]], step: Callable[[Tensor], Tensor] | None
) -> tuple[float, float]:
    r"""Return :math:`s^\top Hs` and :math:`s^\top g` of a batch, given its samples on this rank."""
    problem, theta = hessian.problem, hessian.theta

    def slopes(batch: Any, size: int) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(problem.loss(theta, batch), theta, allow_unused=True)

    gradient = batch_mean(problem, slopes, parts)
    direction = gradient if step is None else step(gradient)
    if direction.shape != gradient.shape:
        raise ValueError(
            f"step: returned {tuple(direction.shape)} for a gradient of shape"
            f" {tuple(gradient.shape)}: expected the same shape"
        )
    tangent = problem.unflatten(direction)

    def product(batch: Any, size: int) -> tuple[Tensor | None, ...]:
        return hessian.chunk_product(hessian.linearise(batch, size), tangent)

    image, gradient = batch_mean(problem, product, parts).double(), gradient.double()
    direction = direction.double()
    curvature, slope = torch.stack([direction @ image, direction @ gradient]).tolist()
    return curvature, slope
