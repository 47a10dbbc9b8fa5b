"""Deep semi-supervised image classification in JAX."""
