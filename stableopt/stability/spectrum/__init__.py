"""Quantities of the spectrum: several top eigenvalues, the trace, and the density."""
