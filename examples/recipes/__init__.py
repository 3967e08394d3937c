"""Training recipes: flags of train.py for rows of the paper's tables, one TOML file each."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import tyro

from errors import UserError, first_line

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """All recipes."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def parse(config: type, arguments: list[str]) -> Any:
    """What the command line asks for, on top of the recipe that it names."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    recipe = finder.parse_known_args(arguments)[0].recipe
    given = [] if recipe is None else flags(recipe, config)
    return tyro.cli(config, args=given + arguments)


def flags(name: str, config: type) -> list[str]:
    """The flags of a recipe, to stand before those that are given, which then win.

    Results go to a run folder of the recipe's name.

    Args:
      name: one of `names()`.
      config: the dataclass of flags.

    Raises:
      UserError: if there is no such recipe, or it sets what no flag takes.
    """
    if name not in names():
        raise UserError(f"unknown --recipe {name!r}; choose one of {', '.join(names())}.")
    file = FOLDER / f"{name}.toml"
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}; mend its TOML.") from error
    known = {field.name for field in dataclasses.fields(config)} - {"recipe"}
    found = [f"--run-dir=runs/{name}"]
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{file} sets {key}; take it out, or see --help for the flags.")
        words = _words(f"--{key.replace('_', '-')}", value)
        try:
            with contextlib.suppress(UserError):  # What goes with what is judged with all flags.
                tyro.cli(config, args=words, console_outputs=False)
        except SystemExit:
            raise UserError(f"{file} sets {key} = {value!r}; see --help for its values.") from None
        found += words
    return found


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-")]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]
