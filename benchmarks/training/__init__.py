"""Data, networks, training loops and the jobs that several experiments share."""
