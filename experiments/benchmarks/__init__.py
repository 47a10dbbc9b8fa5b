"""Parts of `experiments/speed.py`."""
