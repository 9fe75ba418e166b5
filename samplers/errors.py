"""The one exception for bad input, so that a command can tell it from a bug."""


class DecalError(ValueError):
    """Bad input. The message is one line: what, where, what is allowed, what was given."""
