"""Active learning: acquisition functions and label oracles."""
