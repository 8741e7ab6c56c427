r"""The edge ratios of several optimizers, each over its own parameters.

.. math:: \max_b\ \lambda_{\max}(P_bH_{bb}) / k_b,

with the preconditioner :math:`P_b` and the limit :math:`k_b` of optimizer b, and the block
:math:`H_{bb}` of the Hessian on its parameters. A ratio above 1 means that this optimizer alone would
leave the point. Ratios below 1 do not mean that all together stay: the blocks interact.
"""

from __future__ import annotations

from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.rules.coordinates import as_seen_by
from stableopt.stability.rules.several import Block, SeparateBlocks

__all__ = ["block_edge"]


def block_edge(at: Evaluation) -> QuantityResult:
    """Measure the largest edge ratio of a block; ``details`` has that of each by its name."""
    assert at.rule is not None
    assert isinstance(at.rule.preconditioner, SeparateBlocks)
    found: dict[str, Measurement] = {}
    for block in at.rule.preconditioner.blocks:
        held = {id(p) for p in block.params}
        if block.rule.unknown is None and any(id(p) in held for p in at.problem.params):
            found[block.name] = _ratio(at, block)
    if not found:
        return QuantityResult()
    name = max(found, key=lambda name: found[name].value)
    details = {name: measurement.value for name, measurement in found.items()}
    return QuantityResult(found[name].value, measurement=found[name], details=details)


def _ratio(at: Evaluation, block: Block) -> Measurement:
    """Measure the edge ratio of a block."""
    rule = block.rule
    problem = as_seen_by(at.problem.restricted(block.params), rule, [block.optimizer])
    # Without warm starts, which would be vectors of another size than the monitor's.
    own = Evaluation(problem, rule, None, None, at.tol, at.max_iter, at.seed)
    found = own.top_eigenvalue(
        block.name,
        own.hessian(),
        preconditioner=own.preconditioner,
        value=lambda top: top / rule.max_sharpness,
    )
    assert found.measurement is not None
    return found.measurement
