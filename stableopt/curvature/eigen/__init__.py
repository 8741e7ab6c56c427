"""Largest eigenvalues of symmetric operators, from products with vectors."""

from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.eigen.result import Eigenpair
from stableopt.curvature.eigen.top_eigenpair import top_eigenpair
from stableopt.curvature.eigen.top_eigenpairs import Eigenpairs, top_eigenpairs

__all__ = [
    "Eigenpair",
    "Eigenpairs",
    "InnerProduct",
    "top_eigenpair",
    "top_eigenpairs",
]
