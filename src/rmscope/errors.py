"""The one error that a person can act on."""


class InputError(Exception):
    """Bad usage or bad input: one sentence that says what is wrong, where, and the mend.

    The command line prints the sentence and exits with code 2; a traceback appears only with ``--debug``.
    """
