"""The one exception whose message is written for the person who gave the input."""


class PararnnError(ValueError):
    """Something a user can mend: the message says what is wrong, where, and what to do.

    The command line prints it as one sentence and exits with code 1.
    """
