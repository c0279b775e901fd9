"""The one error that a person is meant to read."""


class UserError(ValueError):
    """Bad input or a bad machine: one line that says what is wrong and what to do; all that the command line prints."""


def first_line(error: BaseException) -> str:
    """What ``error`` says first; its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
