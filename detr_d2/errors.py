"""The one exception type for what a user can mend."""


class UserError(ValueError):
    """A wrong file, key or number. The message is one sentence that names it and says what to do;
    the tools print it without a traceback and exit with status 1."""
