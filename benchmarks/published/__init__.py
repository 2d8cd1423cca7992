"""The published step, on transformers' and PEFT's own forward."""
