"""Update rules of optimizers: learning rate, momentum, weight decay and preconditioner."""
