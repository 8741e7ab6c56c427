"""Layer kinds whose per-sample gradients have a known structure."""
