"""L-BFGS with the results and checkpoints of ``torch.optim.LBFGS``, and stability margins."""
