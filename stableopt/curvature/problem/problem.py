r"""`Problem`: a model, a loss and data, as a differentiable function of the parameters.

.. math:: f(\theta) = \frac1n \sum_{i=1}^n f_i(\theta)

A :class:`Problem` reads the data, runs the model at any parameters, and maps a flat vector ``(d,)`` to
the parameters' shapes. The model, its gradients and its random state stay unchanged. Three examples::

    Problem(model, nn.MSELoss(), (x, y))                        # two tensors
    Problem(model, nn.CrossEntropyLoss(), loader, chunk_size=64)  # bounded memory
    Problem.from_batch_loss(model, lambda model, batch: model(**batch).loss, batches)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.curvature.autodiff import flat
from stableopt.curvature.isolation.plain_kernels import AttentionWatcher
from stableopt.curvature.problem.data.batches import cut, map_tensors
from stableopt.curvature.problem.data.draws import (
    RANDOM,
    depends_on_draws,
    draws_random_numbers,
    fix_draw,
    seed_of,
)
from stableopt.curvature.problem.derivatives.gradient_in_call import gradient_in_call
from stableopt.curvature.problem.derivatives.second_derivative import alias_leaves, fresh_leaves
from stableopt.curvature.problem.differentiable_loss import DifferentiableLoss
from stableopt.curvature.problem.held import check_leaves, masks_of_hooks
from stableopt.curvature.problem.loss_checks import (
    CHECKED_SAMPLES,
    UNEQUAL,
    UNEQUAL_HALF,
    UNEQUAL_SINGLE,
    check_mean,
    check_partial_batch,
    check_replicas,
    checked_scalar,
    differs,
    parameters_changed_by,
    twice_over,
    unequal_samples_message,
    warn_of_single_sample_chunks,
)
from stableopt.curvature.problem.mean_loss import Theta
from stableopt.curvature.problem.over_chunks import mean_over_chunks
from stableopt.curvature.problem.parameters import real_view, swapped_state
from stableopt.curvature.problem.weights.survey import (
    SPREAD_SAMPLES,
    Survey,
    difference_of_parts,
    displaced_at_random,
)
from stableopt.curvature.problem.weights.totals import WeightTotals, weighted_means_in, weights_of
from stableopt.curvature.problem.weights.weights import EqualWeights, GivenWeights
from stableopt.distributed.collectives import Ranks
from stableopt.distributed.fsdp import mesh_of

__all__ = ["Problem", "Theta"]


class Problem(DifferentiableLoss):
    r"""The mean loss of ``model`` on ``data`` as a function of the flat parameter vector.

    Args:
        model: any module. A compiled module is measured as the module it was compiled from.
        loss_fn: ``loss_fn(model(x), y)``, a scalar, the *mean* over the samples of a batch.
        data: an ``(x, y)`` pair, a ``Dataset`` or ``DataLoader`` of such pairs, or any re-iterable
            of batches. Batches are moved to the model's device; samples have the weights of the
            loss, also in a smaller last batch.
        params: the d parameters to differentiate in; by default all trainable ones of ``model``.
            Parameters of a module that ``loss_fn`` is or holds are allowed. Complex parameters are
            represented by their real view.
        chunk_size: the most samples evaluated at once: less memory, the same result but for noise.
        max_samples: the most samples to use, by default all. Tensors and data sets read in order give
            a random choice, the same each time; other data give their first samples.
        dtype: the precision, by default the parameters'. ``torch.float32`` and ``torch.float64`` cast
            parameters, buffers and data; ``torch.bfloat16`` and ``torch.float16`` turn on autocast.
        batch_statistics: whether batch norm normalises by the statistics of each batch, as in
            training, instead of its running ones. f is then the mean loss over the batches of
            ``data``, cut at ``chunk_size``, and per-sample curvature is undefined.
        sample_weight: the weights w of a loss :math:`\sum_i w_i f_i/\sum_i w_i`: a tensor ``(n,)`` in
            the data's order, or a function of a batch that returns one. The samples' losses are then
            :math:`\tilde f_i = n w_i f_i/\sum_j w_j`, whose mean is f. By default the weights are
            those that torch's own losses take from class weights and ignored targets; other losses
            that weigh samples unequally are refused where it matters.
        batch_dim: the dimension of the data's tensors that counts the samples, 0 by default: 1 for
            time-first batches ``(T, n, ...)``, a pair such as ``(1, 0)`` for inputs and targets.
            Tensors of fewer dimensions, and the stacked samples of a ``Dataset``, count samples first.
        second_derivatives: whether the constructor checks that the model can be differentiated twice;
            ``False`` delays the check to the first product with a Hessian.
        process_group: a ``torch.distributed`` group whose ranks measure together: ``data`` is then
            this rank's shard, and a product takes one all-reduce. All ranks must make and use the
            problem in the same way. By default this process is alone, also with a
            ``DistributedDataParallel`` model.

    Attributes:
        obstacle: why the model cannot be differentiated twice, or ``None``. With an obstacle the
            Hessian uses central differences, on all ranks.
        kinked: with an obstacle, whether the gradient jumps, as behind ReLU or max-pooling. Central
            differences are then taken in double precision, over steps without a jump.

    Raises:
        ValueError: for a loss that is not a scalar, not a mean over samples (tested by doubling a
            batch), or whose gradient is not its derivative; for empty or endless data; for parameters
            on several devices, of several dtypes, or that differ between ranks; for ``sample_weight``
            that disagree with the loss; without them, for a loss in several chunks whose samples see
            each other or have unknown unequal weights.
        TypeError: for data that can be read only once, or parameters that are not of single or double
            precision.
        RuntimeError: for a model that cannot be differentiated even once.
        LostRankError: if another rank has ended, or does not answer within the group's timeout.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> problem = Problem(model, nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
    >>> problem.num_params, problem.num_samples
    (2, 4)
    """

    sharded = False
    equal_weights = True
    _may_write_params = True
    """Whether a forward pass may write to ``params``."""
    _unequal_message = ""
    _changed_in_forward: frozenset[str] = frozenset()
    """Names of parameters outside of ``params`` that a forward pass changes."""

    def _checked_placement(self, ranks: Ranks) -> Ranks:
        if mesh_of(self.model) is not None:
            raise TypeError(
                "model is under fully_shard: expected a ShardedProblem, as measure() and track() make"
            )
        return ranks

    def _set_parameters(self, names: list[str], params: list[nn.Parameter]) -> None:
        super()._set_parameters(names, params)
        self.masks = masks_of_hooks(dict(zip(names, params, strict=True)))
        self.coordinates = self.coordinates.masked(self.masks)

    def _check(self) -> None:
        theta = self.theta()

        def value(batch: Any) -> float:
            return float(self._evaluated(theta, batch).detach())

        def evaluate() -> None:
            with self.evaluation():
                check_partial_batch(
                    lambda part: self.loss(theta, part), lambda: next(self.chunks()), self._dtype
                )

        counted = set(self.names)
        others = {n: p for n, p in self.model.named_parameters() if n not in counted}
        self._changed_in_forward = parameters_changed_by(evaluate, others)
        if self.large:  # find out whether later evaluations can do without a copy
            self._may_write_params = differs(theta, self._values())
            theta = ()  # frees the copy
            theta = self.theta(lasting=False)
        with self.evaluation():
            batch, size = next(self.chunks())
            size = min(size, CHECKED_SAMPLES)
            batch = cut(batch, 0, size)
            with AttentionWatcher(self._replaced_operations.add):
                once = value(batch)
            doubled = twice_over(batch)
            self._check_loss_inputs(theta, batch, doubled)
            if not self._random:
                check_mean(once, value(doubled), of_batches=self._batch_statistics)
            if not self._batch_statistics:
                self._find_weights(theta, batch)
            self._check_derivatives(batch, size, twice=self._second_derivatives)

    def _check_loss_inputs(self, theta: Theta, batch: Any, doubled: Any) -> None:
        """Check the tensors and random numbers that the loss uses besides the model."""
        counted = dict(zip(self.names, self.params, strict=True))
        with self.evaluation():
            check_leaves(self.loss(theta, batch), theta, counted, self._objective)
        with self.evaluation():
            self._random = depends_on_draws(
                lambda part: self.loss(theta, part), batch, doubled, self._objective.generators
            )

    def _find_weights(self, theta: Theta, batch: Any) -> None:
        """Find the weights of this rank's samples, and compare a gradient with its samples'."""

        def evaluating(chunk: Any) -> Callable[[], Any]:
            return lambda: self.loss(theta, chunk)

        means = weighted_means_in(evaluating(batch))
        most = max(CHECKED_SAMPLES, min(SPREAD_SAMPLES, self.batches.chosen or SPREAD_SAMPLES))
        survey = Survey.of(self.chunks(), sought={m.ignore_index for m in means}, most=most)
        means = weighted_means_in(evaluating(survey.batch))
        chunks = (chunk for chunk, _ in self.chunks())
        if isinstance(self._weights, GivenWeights):
            self._totals = WeightTotals.of_given(self._weights, chunks)
        else:
            in_model = 0
            if means and self.loss_fn is not None:
                in_model = len(weighted_means_in(lambda: self.outputs(theta, batch)))
            if len(means) > 1:
                of_one_sample = weighted_means_in(evaluating(cut(survey.batch, 0, 1)))
                if len(means) != len(of_one_sample):
                    means = []  # a loop over samples: no call is a mean over the batch
            self._totals = WeightTotals.of_loss(means, survey, map(evaluating, chunks), in_model)
        complete = not self.ranks.several
        self._weights = weights_of([self._totals], self._weights, complete=complete)
        self._difference = 0.0
        # With random numbers a sample's loss differs between batches.
        if self._random or draws_random_numbers(evaluating(batch), self._objective.generators):
            return
        coarse = UNEQUAL_SINGLE if self.precision.autocast is None else UNEQUAL_HALF
        difference = self._gradient_difference(survey)
        if difference <= coarse:
            # Rounding may explain the difference; in double precision it cannot.
            twin = self.in_double()
            recheck = difference > UNEQUAL and not self.large and self._runs_in(twin, survey.batch)
            difference = twin._gradient_difference(survey) if recheck else 0.0
            difference = difference if difference > UNEQUAL else 0.0
        self._difference, self._samples_independent = difference, difference <= UNEQUAL

    def _gradient_difference(self, survey: Survey) -> float:
        """Return the relative difference of a batch's gradient and the mean of its parts'."""
        point = displaced_at_random(self._values())

        def gradient(part: Any) -> Tensor:
            with self.evaluation():
                value = self.loss(point, self._cast(part))
            if not value.requires_grad:  # the check of the derivatives reports it
                return torch.zeros(1, dtype=value.dtype, device=value.device)
            return flat(torch.autograd.grad(value, point, allow_unused=True), point)

        return difference_of_parts(gradient, survey.batch, survey.size)

    def _agree_on_weights(self) -> None:
        """Agree on the weights, and find out whether samples have curvature of their own."""
        if self._batch_statistics:
            self.equal_weights = False
            return
        given = isinstance(self._weights, GivenWeights)
        totals = self.ranks.all_gather_object(self._totals)
        had_weights = not isinstance(self._weights, EqualWeights)
        self._weights = weights_of(totals, self._weights)
        # Ranks whose losses take different means have no weights in common.
        incompatible = had_weights and isinstance(self._weights, EqualWeights)
        facts = (self._difference, incompatible, self.batches.num_chunks)
        differences, clashes, counts = zip(*self.ranks.all_gather_object(facts), strict=True)
        if self._random:
            self.equal_weights = False
            return
        difference, chunks = max(differences), sum(counts)
        if difference == 0 and not any(clashes):
            return
        if chunks == self.num_samples > 1 and not given:
            warn_of_single_sample_chunks(difference)
            return
        self.equal_weights = False
        self._unequal_message = unequal_samples_message(difference, chunks, given=given)
        if given or chunks > 1:
            raise ValueError(self._unequal_message)

    def _check_together(self) -> None:
        self._random = self.ranks.any(self._random)
        self._agree_on_weights()
        if self.ranks.several:
            self._agree_on_derivatives()
            check_replicas(self.ranks, self.params)

    def check_samples(self, what: str) -> None:
        """Raise ``ValueError`` if samples have no curvature of their own; ``what`` needs it."""
        if self._batch_statistics:
            raise ValueError(
                f"{what} needs the samples' own Hessians. With batch_statistics=True there are none:"
                " a sample's loss depends on the others in its batch. Use batch_statistics=False"
            )
        if self._random:
            raise ValueError(f"{what} needs the samples' own Hessians. {RANDOM}")
        if not self.equal_weights:
            raise ValueError(f"{what} needs the samples' own Hessians. {self._unequal_message}")

    def theta(self, *, lasting: bool = True) -> Theta:
        """Return a copy of the parameters as they are now: leaves that require gradients.

        Without ``lasting``, leaves of a large model share the parameters' memory, unless its forward
        pass may write to them.
        """
        # Tensors made in an ambient inference mode cannot be differentiated.
        with torch.inference_mode(False):
            copied = lasting or self._may_write_params or not self.large
            return tuple(
                (t.clone() if copied or t.is_inference() else t).requires_grad_()
                for t in self._values()
            )

    def _values(self) -> Theta:
        return tuple(real_view(p.detach()).to(self.dtype) for p in self.params)

    def loss(self, theta: Theta, batch: Any) -> Tensor:
        """Return the mean loss of ``batch`` at ``theta``, times ``sign``: a differentiable scalar.

        Call it inside :meth:`evaluation`.
        """
        if self._random:
            fix_draw(seed_of(batch), self.device, self._objective.generators)
        in_call = self._in_call and torch.is_grad_enabled() and any(t.requires_grad for t in theta)

        def evaluate(part: Any) -> Tensor:
            if in_call:
                return gradient_in_call(lambda leaves: self._call(leaves, part, leaves), theta)
            return checked_scalar(self._call(theta, part))

        with self.precision.around():
            loss = self._weights.mean(evaluate, batch)
        return self.sign * loss.to(self.dtype)

    def _call(self, theta: Sequence[Tensor], *args: Any) -> Any:
        """Call the objective with its parameters at ``theta``."""
        state = self._state(self._objective, theta, "model.")
        return functional_call(self._objective, state, args)

    def loss_of_outputs(self, outputs: Any, batch: Any) -> Tensor:
        """Return the mean loss of an ``(x, y)`` batch from the model's outputs, times ``sign``."""
        loss_fn = self.loss_fn
        assert loss_fn is not None, "a problem from a batch loss"
        if dim := self.layout.output_dim(batch):
            outputs = map_tensors(lambda t: t.movedim(0, dim), outputs)
        loss = self._weights.mean(
            lambda pair: loss_fn(outputs, self.layout.given(pair)[1]), batch, in_loss=True
        )
        return self.sign * loss

    def outputs(self, theta: Theta, batch: Any) -> Any:
        """Return the model's outputs for the inputs of an ``(x, y)`` batch at ``theta``."""
        state, dim = self._state(self.model, theta, ""), self.layout.output_dim(batch)
        with self.precision.around():
            outputs = functional_call(self.model, state, (self.layout.given(batch)[0],))
        return map_tensors(lambda t: t.movedim(dim, 0), outputs) if dim else outputs

    def _state(self, module: nn.Module, theta: Sequence[Tensor], prefix: str) -> dict[str, Tensor]:
        counted = {
            name if name in self.names_in_loss else prefix + name: (p, value)
            for name, p, value in zip(self.names, self.params, theta, strict=True)
            if module is not self.model or name not in self.names_in_loss
        }
        changed = {prefix + name for name in self._changed_in_forward}
        return swapped_state(module, counted, changed, self.precision)

    def value(
        self,
        theta: Theta | None = None,
        chunk_size: int | None = None,
        *,
        evaluating: bool = False,
    ) -> float:
        """Return the mean loss over all samples, times ``sign``, at ``theta`` or the parameters.

        ``chunk_size`` is the most samples at once, as for :meth:`chunks`. ``evaluating`` says that the
        caller is already inside :meth:`evaluation`.
        """
        point = self._values() if theta is None else theta
        # With gradients on: without them some modules take another path, and models that
        # differentiate in their forward pass fail.
        with torch.inference_mode(False):
            total = torch.zeros((), dtype=torch.float64, device="cpu")

        def add(batch: Any, size: int) -> None:
            total.add_(size * self._loss_value(point, batch).detach().double().cpu())

        chunks = self.chunks(chunk_size)
        return float(mean_over_chunks(self, [total], add, chunks, evaluating=evaluating)[0])

    def loss_and_gradient(
        self, theta: Theta | None = None, *, evaluating: bool = False
    ) -> tuple[float, Tensor]:
        """Return :meth:`value` and the gradient ``(d,)``, from one pass over the data."""
        if theta is None:
            leaves = self.theta(lasting=False)
        else:
            leaves = tuple((fresh_leaves if self._may_write_params else alias_leaves)(theta))
        with torch.inference_mode(False):
            total = self.zeros()
        loss_sum = sample_count = 0.0

        def add(batch: Any, size: int) -> None:
            nonlocal loss_sum, sample_count
            loss = self.loss(leaves, batch)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            self.coordinates.add_to(total, gradients, size)
            loss_sum += size * float(loss.detach())
            sample_count += size

        [gradient] = mean_over_chunks(self, [total], add, self.chunks(), evaluating=evaluating)
        loss_sum = self.ranks.all_reduce_sum(loss_sum)
        return loss_sum / self.ranks.all_reduce_sum(sample_count), gradient
