"""The training loop and its compiled parts."""
