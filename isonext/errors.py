"""The one error that a user sees."""


class UserError(Exception):
    """Bad input. Its one line says what was wrong, where, and what to do; the command exits with status 2."""
