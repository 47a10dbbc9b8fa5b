"""Analysis of trained models: embeddings and label propagation."""
