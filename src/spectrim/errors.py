"""The one error that a person is meant to read."""


class UserError(ValueError):
    """Bad input or a bad machine: one line that says what is wrong and what to do; all that the command line prints."""


def first_line(error: BaseException) -> str:
    """What ``error`` says first; its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def innermost(error: BaseException) -> str:
    """The message of the first ``UserError`` in the chain, else what was said, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    return " ".join(str(error).partition("Config search path:")[0].split()) or type(error).__name__
