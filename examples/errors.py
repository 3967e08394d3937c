"""Mistakes that a user can mend, and errors of other libraries that mean one."""

import re
from typing import Any

# What XLA puts before the cause of an error, once for every layer that it passes.
PREFIX = re.compile(r"^.*(Error dispatching computation|Error preparing computation): ")
# Patterns of other libraries' errors, type first, and what each means. Flags stand in braces.
MEANINGS = (
    (
        r"Worker process was terminated unexpectedly with exit code -(\d+)",
        "a data worker was killed by signal {0} (9 is what the system sends when memory runs out); "
        "use fewer {workers}, and go on with --resume.",
    ),
    (
        r"Worker process was terminated unexpectedly with exit code (\d+)",
        "a data worker ended with exit code {0}, and may have said why above; without {workers} "
        "threads read the images.",
    ),
    (
        r"RESOURCE_EXHAUSTED: .*allocat|[Oo]ut of memory|OUT_OF_MEMORY",
        "the devices do not have enough memory ({cause}); use a smaller {batch_size} or "
        "{image_size}.",
    ),
    (
        r"^\w*MemoryError|bad_alloc|Cannot allocate memory",
        "this machine does not have enough memory ({cause}); use a smaller {batch_size} or "
        "{image_size}, or fewer {workers}.",
    ),
)
FLAGS = ("batch_size", "image_size", "workers")


class UserError(Exception):
    """A mistake that the user can mend; scripts show its message as one line."""


class PassingError(UserError):
    """Something that another attempt may not meet again."""


def first_line(error: Exception) -> str:
    """What is worth showing of an error that may fill a page."""
    line = str(error).strip().partition("\n")[0]
    line = PREFIX.sub("", line) or type(error).__name__
    line = " ".join(line.rstrip(".:").split())
    return line if len(line) <= 300 else line[:296] + " ..."


def markup(content: bytes) -> str | None:
    """What a failed download leaves, by the first bytes of a file; None for anything else."""
    start = content.lstrip()[:15].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page"
    # Binary files may begin with the same byte.
    is_text = start.startswith(b"<") and b"\0" not in start
    return "markup, perhaps an error message of a server" if is_text else None


def page_hint(content: bytes) -> str:
    """What to add to an error about a file that may be a failed download."""
    found = markup(content)
    return f", as it holds {found}" if found else ""


def meaning(error: Exception, config: Any = None) -> Exception:
    """The `UserError` that an error of another library means, or the error itself.

    Args:
      error: what was raised.
      config: holds the flags, whose values the message names; None to leave them out.
    """
    if isinstance(error, UserError):
        return error
    if not isinstance(error, (RuntimeError, MemoryError, OSError)):
        return error
    flags = {name: _flag(name, config) for name in FLAGS}
    for pattern, text in MEANINGS:
        if found := re.search(pattern, f"{type(error).__name__}: {error}"):
            kind = PassingError if "--resume" in text else UserError
            return kind(text.format(*found.groups(), cause=first_line(error), **flags))
    return error


def _flag(name: str, config: Any) -> str:
    value = getattr(config, name, None)
    return f"--{name.replace('_', '-')}" + ("" if value is None else f" (now {value})")
