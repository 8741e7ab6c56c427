"""Curvature matrices as products with vectors: top eigenpairs, traces and spectra."""

from stableopt.curvature.eigen.result import Eigenpair
from stableopt.curvature.eigen.top_eigenpair import top_eigenpair
from stableopt.curvature.eigen.top_eigenpairs import Eigenpairs, top_eigenpairs
from stableopt.curvature.errors import DifferenceError, NonFiniteError, SecondDerivativeError
from stableopt.curvature.gram.gram import DualCurvature
from stableopt.curvature.operator import Operator, Preconditioner
from stableopt.curvature.per_sample.non_uniformity import NonUniformity
from stableopt.curvature.problem.cost import Cost
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.problem.sharded import ShardedProblem
from stableopt.curvature.products.gauss_newton import GaussNewton
from stableopt.curvature.products.hessian import Hessian
from stableopt.curvature.products.inverse_hessian import InverseHessian
from stableopt.curvature.products.sharded_hessian import ShardedHessian
from stableopt.curvature.spectrum.density import SpectralDensity, spectral_density
from stableopt.curvature.spectrum.trace import Trace, trace
from stableopt.distributed.collectives import LostRankError

__all__ = [
    "Cost",
    "DifferenceError",
    "DualCurvature",
    "Eigenpair",
    "Eigenpairs",
    "GaussNewton",
    "Hessian",
    "InverseHessian",
    "LostRankError",
    "NonFiniteError",
    "NonUniformity",
    "Operator",
    "Preconditioner",
    "Problem",
    "SecondDerivativeError",
    "ShardedHessian",
    "ShardedProblem",
    "SpectralDensity",
    "Trace",
    "spectral_density",
    "top_eigenpair",
    "top_eigenpairs",
    "trace",
]
