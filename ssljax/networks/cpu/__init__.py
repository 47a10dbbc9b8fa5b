"""Convolutions and poolings that are fast on CPUs."""
