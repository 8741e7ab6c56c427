"""Exact Gauss–Newton curvature of small problems, from the Gram matrix of per-sample Jacobians."""
