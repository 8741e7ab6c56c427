r"""The edge ratios of several optimizers, each over its own parameters.

.. math:: \max_b\ \lambda_{\max}(P_bH_{bb}) / k_b,

with the preconditioner :math:`P_b` and the limit :math:`k_b` of optimizer b, and the diagonal block
:math:`H_{bb}` of the Hessian on its parameters. If a ratio is above 1, this optimizer alone would leave
the point. If all are below 1, the optimizers can still leave it together, since the blocks interact.
"""

from __future__ import annotations

from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult, ratio_to_limit
from stableopt.stability.rules.coordinates import in_rule_coordinates
from stableopt.stability.rules.several import OptimizerBlock

__all__ = ["block_edge"]


def block_edge(evaluation: Evaluation) -> QuantityResult:
    """Measure the largest edge ratio of the blocks; ``details`` has all ratios by name."""
    assert evaluation.rule is not None
    ratios: dict[str, Measurement] = {}
    for block in evaluation.rule.blocks:
        trained = {id(p) for p in block.params}
        if block.rule.unknown is None and any(id(p) in trained for p in evaluation.problem.params):
            ratios[block.name] = _edge_ratio(evaluation, block)
    if not ratios:
        return QuantityResult()
    largest = max(ratios.values(), key=lambda measurement: measurement.value)
    details = {name: measurement.value for name, measurement in ratios.items()}
    return QuantityResult(largest.value, measurement=largest, details=details)


def _edge_ratio(evaluation: Evaluation, block: OptimizerBlock) -> Measurement:
    """Measure the edge ratio of one block; infinite if decay alone makes the step unstable."""
    rule, limit = block.rule, block.rule.max_sharpness
    problem = in_rule_coordinates(
        evaluation.problem.restricted(block.params), rule, [block.optimizer]
    )
    # Without warm starts: the monitor's have the size of the whole problem.
    on_block = Evaluation(
        problem,
        rule,
        batch_size=None,
        dataset_size=None,
        tol=evaluation.tol,
        max_iter=evaluation.max_iter,
        seed=evaluation.seed,
    )
    result = on_block.top_eigenvalue(
        block.name,
        on_block.hessian(),
        preconditioner=on_block.preconditioner,
        value=lambda eigenvalue: ratio_to_limit(eigenvalue, limit),
    )
    assert result.measurement is not None
    return result.measurement
