"""`Problem`: a model, a loss and data, as a differentiable function of the parameters."""
