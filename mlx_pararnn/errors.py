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


LOST = (
    "the connection to another process was lost: it has ended, or its machine cannot be reached; look at "
    "what it said, and start all of them again (a training run goes on with --resume)"
)


def is_lost(error: BaseException) -> bool:
    """Whether this was raised because another of several processes has ended."""
    if isinstance(error, PararnnError):
        return str(error) == LOST
    return isinstance(error, RuntimeError) and str(error).startswith(("[ring]", "[jaccl]"))
