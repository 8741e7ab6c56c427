"""One command for each experiment of Wu, Ma & E (NeurIPS 2018): ``python -m benchmarks list``."""
