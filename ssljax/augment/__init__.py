"""Augmentations and preprocessing of single images."""
