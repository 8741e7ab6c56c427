"""Per-sample Hessians and products with their covariance, from which the non-uniformity follows."""
