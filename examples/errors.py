"""Mistakes that a user can mend."""

import re
import textwrap

# What XLA puts before the cause of an error, once for every layer that it passes.
PREFIX = re.compile(r"^.*(Error dispatching computation|Error preparing computation): ")


class UserError(Exception):
    """A mistake that the user can mend; scripts show its message as one line."""


def first_line(error: Exception) -> str:
    """What is worth showing of an error that may fill a page."""
    line = str(error).strip().partition("\n")[0]
    line = PREFIX.sub("", line) or type(error).__name__
    return textwrap.shorten(line.rstrip(".:"), 300, placeholder=" ...")
