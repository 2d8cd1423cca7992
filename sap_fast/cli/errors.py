"""What a command cannot do: printed without a traceback."""


class CommandError(Exception):
    """Raised for what a command cannot do; the message says what was expected, what came and what to do."""
