"""The papers' figures, one file per paper."""
