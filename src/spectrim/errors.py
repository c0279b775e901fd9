"""The error whose message is written for the user."""


class UserError(ValueError):
    """Bad input or an unsuitable machine.

    The message is one line that says what is wrong and what to do. The command line prints only this line.
    """


class MissingInput(UserError):
    """Batches, or targets in them, that the user did not give."""


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error``, or the name of its class if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)
