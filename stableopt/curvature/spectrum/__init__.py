"""Trace and spectral density of an operator."""
