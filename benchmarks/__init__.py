"""The experiments of Wu, Ma & E (NeurIPS 2018) by one command each: ``python -m benchmarks list``."""
