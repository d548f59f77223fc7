"""Measurements against references of the same run: `python -m bench NAME`."""
