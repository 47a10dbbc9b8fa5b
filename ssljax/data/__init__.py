"""Data sets, label splits, and the batches of a step."""
