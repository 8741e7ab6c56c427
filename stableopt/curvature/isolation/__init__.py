"""Forward passes that leave no trace in the model, its buffers or the random state."""
