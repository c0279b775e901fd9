"""The error whose message is written for the user."""


class UserError(ValueError):
    """Bad input or an unsuitable machine.

    The message is one line that says what is wrong and what to do. The command line prints only this line.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error``, or the name of its class if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def innermost(error: BaseException) -> str:
    """The message of the first ``UserError`` in the chain, else what was said, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    return " ".join(str(error).partition("Config search path:")[0].split()) or type(error).__name__
