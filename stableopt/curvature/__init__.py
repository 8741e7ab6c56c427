"""Curvature matrices that are never formed, and their top eigenpairs."""

from stableopt.curvature.diagnose import SecondDerivativeError
from stableopt.curvature.dual import DualCurvature
from stableopt.curvature.eigen import Eigenpair, NonFiniteError, top_eigenpair
from stableopt.curvature.non_uniformity import NonUniformity
from stableopt.curvature.operators import GaussNewton, Hessian, Operator
from stableopt.curvature.problem import Problem

__all__ = [
    "DualCurvature",
    "Eigenpair",
    "GaussNewton",
    "Hessian",
    "NonFiniteError",
    "NonUniformity",
    "Operator",
    "Problem",
    "SecondDerivativeError",
    "top_eigenpair",
]
