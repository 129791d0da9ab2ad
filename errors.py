"""Exceptions that mean something else than "the program is wrong": the input is, or another process is gone."""


class InputError(ValueError):
    """Wrong input of the person who runs kexue: a file, a row, a value, a path.

    The message is one line that says what is wrong, where, and what to type instead. The command line prints it and
    exits with 2; in a script it is an ordinary exception.
    """


class ProcessDied(RuntimeError):
    """Another process of the run is gone, so this one cannot go on.

    Args:
        reason: One line that names it.
        speaks: Whether this is the one of the processes left that tells the user.
    """

    def __init__(self, reason: str, speaks: bool = True) -> None:
        super().__init__(reason)
        self.speaks = speaks
