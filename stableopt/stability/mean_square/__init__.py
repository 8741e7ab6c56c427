"""Exact mean-square stability of SGD: the critical learning rate and batch size."""
