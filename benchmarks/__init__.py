"""What is measured, and how; ``pytest benchmarks/`` runs all of it."""
