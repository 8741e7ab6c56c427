"""`ALONG_STEP`: the quantities along the step."""

from stableopt.stability.along_step.block_edge import block_edge
from stableopt.stability.along_step.critical_sharpness import along_taken_step
from stableopt.stability.along_step.realised_edge import realised_edge
from stableopt.stability.measure.registry import Chart, Quantity

__all__ = ["ALONG_STEP"]

ALONG_STEP = (
    Quantity(
        "block_edge",
        block_edge,
        needs={"blocks"},
        limit=lambda _, __, ___: 1.0,
        any_rule=True,
        chart=Chart("sharpness of a block", r"$\max_b\lambda_{\max}(P_bH_{bb})$", "blocks"),
    ),
    Quantity(
        "realised_edge",
        realised_edge,
        needs={"taken_step"},
        limit=lambda _, __, ___: 1.0,
        any_rule=True,
        first_order=True,
        chart=Chart("realised edge", r"$\zeta$", tag="realised", short_tag="real"),
    ),
    Quantity(
        "critical_sharpness",
        along_taken_step,
        needs={"taken_step"},
        limit=lambda rule, _, __: 2 / rule.lr if rule is not None and rule.lr else None,
        any_rule=True,
        first_order=True,
        chart=Chart("critical sharpness", r"$\lambda_c$", tag="crit_shrp", short_tag="crit"),
    ),
)
"""In the order of measurement."""
