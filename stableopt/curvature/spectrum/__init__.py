"""Quantities of the whole spectrum: the trace, and the density of eigenvalues."""
