"""Convolution and max-pooling that train fast on CPUs."""
