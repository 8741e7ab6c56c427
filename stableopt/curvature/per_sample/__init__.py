"""The covariance of per-sample Hessians, from which the non-uniformity is computed."""
