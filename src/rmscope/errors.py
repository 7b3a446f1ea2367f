"""The one error that a person can act on, and other errors as part of its sentence."""


class InputError(Exception):
    """Bad usage or bad input: one sentence that says what is wrong, where, and the mend.

    The command line prints the sentence and exits with code 2; a traceback appears only with ``--debug``.
    """


def one_line(error: BaseException) -> str:
    """The first line of an error, for use in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip(" .:")
