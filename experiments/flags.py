"""Configs as command-line flags: one flag for each field, each with a clear error."""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal


class UsageError(Exception):
    """A command line that cannot be carried out."""


def nearest(word: str, known: Sequence[str]) -> str:
    """``"; did you mean X?"``, or all there is, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are: {', '.join(known)}" if known else ""


def add_fields(parser: argparse.ArgumentParser, config: type) -> None:
    """Gives the parser one flag per field of a config."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        element, many = _element(hints[field.name], field.name)
        metadata = field.metadata
        text = f"{metadata.get('help', '')} (default: {_word(field.default)}"
        if "quick" in metadata:
            text += f", quick: {_word(metadata['quick'])}"
        flag = "--" + field.name.replace("_", "-")
        options = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": (text + ")").replace("%", "%%"),
        }
        if element is bool and not many:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, **options)
        elif many:
            convert = _Many(element, metadata)
            action = _Extend
            parser.add_argument(
                flag, type=convert, nargs="+", action=action, metavar="X", **options
            )
        else:
            convert = _One(element, metadata)
            metavar = convert.metavar
            parser.add_argument(flag, type=convert, metavar=metavar, **options)


def at_least(low: int) -> Callable[[str], int]:
    """What turns the text of a flag into a whole number of at least ``low``."""
    return _One(int, {"minimum": low})


class _Extend(argparse.Action):
    """Joins ``--arms a,b c`` to one tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(v for part in values for v in part))


class _One:
    """Text to one legal value."""

    def __init__(self, element: Any, metadata: typing.Mapping[str, Any]):
        self._element = element
        self._low = metadata.get("minimum")
        self._high = metadata.get("maximum")
        choices = "{" + ",".join(map(str, typing.get_args(element))) + "}"
        self.metavar = {int: "N", float: "X", str: "NAME"}.get(element, choices)

    def __call__(self, text: str) -> Any:
        try:
            return legal(_convert(text, self._element), self._low, self._high)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


class _Many(_One):
    """Comma-separated text to a tuple of legal values."""

    def __call__(self, text: str) -> tuple:
        parts = [part for part in text.split(",") if part]
        if not parts:
            raise argparse.ArgumentTypeError("needs at least one value")
        return tuple(super(_Many, self).__call__(part) for part in parts)


def _convert(text: str, element: Any) -> Any:
    if typing.get_origin(element) is Literal:
        choices = typing.get_args(element)
        for choice in choices:
            if text == str(choice):
                return choice
        hint = nearest(text, [str(choice) for choice in choices])
        raise ValueError(f"{text!r} is not one of its choices{hint}")
    if element is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{text!r} is neither true nor false")
    if element is str:
        return text
    kind = "a whole number" if element is int else "a number"
    try:
        value = element(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {kind}") from None
    if value != value or value in (float("inf"), -float("inf")):
        raise ValueError(f"must be finite; got {text}")
    return value


def legal(value: Any, low: float | None, high: float | None) -> Any:
    """``value``, if it lies in its interval.

    Raises:
      ValueError: if not.
    """
    if low is not None and value < low:
        raise ValueError(f"must be at least {low}; got {value}")
    if high is not None and value > high:
        raise ValueError(f"must be at most {high}; got {value}")
    return value


def _element(hint: Any, name: str) -> tuple[Any, bool]:
    """A field's type as (element type, whether it is a tuple of them)."""
    many = typing.get_origin(hint) is tuple
    element = typing.get_args(hint)[0] if many else hint
    plain = element in (int, float, str, bool)
    if not plain and typing.get_origin(element) is not Literal:
        raise TypeError(
            f"the config field `{name}` has the type {hint}, which cannot become a "
            "flag; use int, float, str, bool, a Literal or a tuple[X, ...] of these."
        )
    return element, many


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make_config(config: type, *, quick: bool = False, given: dict[str, Any]) -> Any:
    """A config from its defaults, or its quick ones, and what was given.

    Args:
      config: the dataclass.
      quick: take the ``quick`` values of the fields that have one.
      given: values from the command line, by field.

    Returns:
      An instance of ``config``.

    Raises:
      UsageError: if the values don't go together.
    """
    values = {}
    if quick:
        values = {
            field.name: field.metadata["quick"]
            for field in dataclasses.fields(config)
            if "quick" in field.metadata
        }
    try:
        return config(**{**values, **given})
    except ValueError as error:
        raise UsageError(str(error)) from None


def config_from_json(config: type, saved: Any, folder: Path) -> Any:
    """The config that a run folder recorded.

    Raises:
      UsageError: if it does not fit the study as it is now.
    """
    known = {field.name for field in dataclasses.fields(config)}
    if not isinstance(saved, dict) or set(saved) != known:
        odd = sorted(set(saved) ^ known) if isinstance(saved, dict) else "all of it"
        raise UsageError(
            f"the config in {folder / 'config.json'} does not fit this version of the "
            f"study (differs in: {odd}); start a new run with --out."
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    return make_config(config, given=values)
