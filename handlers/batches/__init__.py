"""Batches: the model's arguments, rows and counts in one value, and their padding."""
