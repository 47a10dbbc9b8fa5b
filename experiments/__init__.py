"""The experiment binaries, their presets, tables and figures."""
