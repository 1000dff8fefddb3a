"""How a command says that it can't do its work."""


class CommandError(Exception):
    """Its sentence is what the user is told; the exit status is 1."""
