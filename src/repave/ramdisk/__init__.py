"""Builds the boot media: a small Linux from Debian packages that carries the agent, on an ISO that a run makes live while it is read."""
