"""Batches of the data: read, counted, cut into chunks, or kept as a fixed probe."""
