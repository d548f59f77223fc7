"""Repave reinstalls the operating system of a fleet of bare-metal servers with one call."""

__version__ = "0.1.0"
