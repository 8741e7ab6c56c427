"""Blocks of parameters, such as the layers of a model, and what is measured of each."""
