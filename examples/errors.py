"""Mistakes that a user can mend."""

import textwrap


class UserError(Exception):
    """A mistake that the user can mend; scripts show its message as one line."""


def first_line(error: Exception) -> str:
    """What is worth showing of an error that may fill a page."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return textwrap.shorten(line.rstrip(".:"), 300, placeholder=" ...")
