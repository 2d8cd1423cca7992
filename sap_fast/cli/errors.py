"""What a command cannot do: printed without a traceback."""


class CommandError(Exception):
    """The message says what was expected, what came and what to do."""
