"""Steps on batches, the training loop, and what comes after the fit."""
