"""Figures of the papers, and the program `figures`."""
