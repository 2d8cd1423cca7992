"""A whole training step against others, on the same tokens: see ``python -m benchmarks.step``."""
