"""Checks that the derivatives of autograd are those of the loss."""
