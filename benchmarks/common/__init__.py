"""What the benchmarks share: models, clocks, charts, compiled kernels, and how a result is recorded."""
