"""Data, networks, training loops and jobs shared by several experiments."""
