"""What there is to try and to measure on one GPU, in two commands: see ``__main__.py``."""
