"""A transformers model becomes a ``Decoder``: read, checked, and run by the library's own loop."""
