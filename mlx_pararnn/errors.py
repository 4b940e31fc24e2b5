"""The one exception whose message is written for the person who gave the input, and what others say."""


class PararnnError(ValueError):
    """Something a user can mend: the message says what is wrong, where, and what to do.

    The command line prints it as one sentence and exits with code 1.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception of another library says; else its type's name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def one_line(error: BaseException) -> str:
    """What an exception of another library says, in at most 300 characters; else its type's name."""
    return " ".join(str(error).split())[:300].rstrip(" .:") or type(error).__name__
