"""The least time that a step can take: see ``python -m benchmarks.floor``."""
