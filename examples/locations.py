"""Paths as people write them: with a ~, or in a bucket."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from etils import epath

from errors import UserError

BUCKETS = ("gs://", "s3://", "az://")


def parse(text: str) -> Any:
    """A path of this machine, or of a bucket, such as gs://name/folder or s3://name/folder."""
    if is_bucket(text):
        return epath.Path(text)
    _refuse_schemes(text, f"a local path, or a bucket that begins with {' or '.join(BUCKETS)}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"the path {text} cannot be used: {error}; write it out.") from error


def parse_local(text: str) -> Path:
    """A path of this machine."""
    if is_bucket(text):
        raise UserError(
            f"the path {text} is in a bucket, which only --run-dir of train.py can use; copy it to "
            "this machine, or choose a local folder."
        )
    _refuse_schemes(text, "a local path")
    return parse(text)


def _refuse_schemes(text: str, known: str) -> None:
    """Raises a UserError for a URL, which would become a folder of that name."""
    if re.match(r"[A-Za-z][\w+.-]*://", text):
        raise UserError(f"the path {text} cannot be used; give {known}.")


def is_bucket(path: Any) -> bool:
    return str(path).startswith(BUCKETS)


def _flag_type(parser: Callable[[str], Any]) -> Any:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: parser(words[0]),
        is_instance=lambda x: isinstance(x, (Path, epath.Path)),
        str_from_instance=lambda x: [str(x)],
    )


AnyPath = Annotated[Path, _flag_type(parse)]
LocalPath = Annotated[Path, _flag_type(parse_local)]
