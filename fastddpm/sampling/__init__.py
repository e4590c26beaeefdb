"""Sampling: from settings and a model to images. `run.py` holds the loop."""
