"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Wrong input of the person who runs kexue: a file, a row, a value, a path.

    The message is one line that says what is wrong, where, and what to type instead. The command line prints it and
    exits with 2; in a script it is an ordinary exception.
    """
