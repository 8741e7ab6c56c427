"""Weights of samples, as the loss averages with them."""
