"""The reinstall workflow: the port, the workflow, its effects, admission, the engine."""
