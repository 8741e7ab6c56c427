"""Curvature through the Gram matrix of per-sample Jacobians, for small problems: exact and dense."""
