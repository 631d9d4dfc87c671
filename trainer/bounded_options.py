"""Whole numbers on a command line, within bounds."""

from q4kd.trainer.errors import InputError


def count(option: str, text: str, most: int) -> int:
    """Return a number from 1 to ``most``.

    Raises:
        InputError: naming the option.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 8 and 1 <= int(text) <= most):
        raise InputError(option, expected=f"a whole number from 1 to {most}", got=repr(text)[:40], remedy="correct it")
    return int(text)
