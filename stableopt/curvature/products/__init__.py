"""Products with the Hessian, the Gauss–Newton matrix and the L-BFGS inverse Hessian."""
