"""The settings of a recipe to lines "key = value", and such lines to a recipe with other settings.

A key is a path of field names, as in "loop.steps" or "autoencoder.config.latent_channels"; the annotation of the field
says what its value must be, and for the entries of a dictionary the value that is there does.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

R = TypeVar("R")

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
_TRUTHS = {"true": True, "false": False}


def settings_of(recipe: Any) -> dict[str, Any]:
    """All settings of a recipe by their keys, in its order."""
    return {key: value for key, value, _ in _leaves(recipe, "")}


def lines_of(recipe: Any) -> list[str]:
    """One line "key = value" for each setting; `override` takes them back."""
    return [f"{key} = {_text(value)}" for key, value in settings_of(recipe).items()]


def override(recipe: R, assignments: Sequence[str]) -> R:
    """The recipe with other settings, each given as "key=value"; the last one of a key counts.

    Raises:
        ValueError: for a key that there is not, naming the nearest one there is; for a value of the wrong kind, naming
            the right one; and for settings that the recipe itself refuses.
    """
    annotations = {key: annotation for key, _, annotation in _leaves(recipe, "")}
    values = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise ValueError(f"a setting is given as key=value, got {assignment!r}")
        if key not in annotations:
            raise ValueError(f"there is no setting {key!r}{_advice(key, list(annotations))}")
        try:
            values[key] = _parse(text, annotations[key])
        except ValueError:
            raise ValueError(f"{key} must be {_wanted(annotations[key])}, got {text!r}") from None
    return _with_values(recipe, "", values)


def _advice(key: str, known: list[str]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f": it is a group of settings, such as {inside[0]}"
    nearest = get_close_matches(key, known, n=1, cutoff=0.0)
    return f"; the nearest is {nearest[0]!r}"


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Key, value and annotation of everything below a dataclass or a dictionary."""
    if is_dataclass(value):
        annotations = get_type_hints(type(value))
        entries = [(field.name, getattr(value, field.name), annotations[field.name]) for field in fields(value)]
    else:
        entries = [(name, entry, _annotation_of(entry)) for name, entry in value.items()]
    for name, entry, annotation in entries:
        if is_dataclass(entry) or isinstance(entry, dict):
            yield from _leaves(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry, annotation


def _annotation_of(value: Any) -> Any:
    # A tuple of other tuples is whatever Python reads as one.
    return Any if value is None or isinstance(value, tuple) else type(value)


def _with_values(value: Any, prefix: str, values: dict[str, Any]) -> Any:
    """A dataclass or dictionary with other values below it; what nothing changes stays the same object."""
    if not any(key.startswith(prefix) for key in values):
        return value
    entries = value if isinstance(value, dict) else {field.name: getattr(value, field.name) for field in fields(value)}
    changed = {
        name: _with_values(entry, f"{prefix}{name}.", values)
        if is_dataclass(entry) or isinstance(entry, dict)
        else values.get(f"{prefix}{name}", entry)
        for name, entry in entries.items()
    }
    return changed if isinstance(value, dict) else replace(value, **changed)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    return str(value)


def _parse(text: str, annotation: Any) -> Any:
    """The value of a text; ValueError if it is none of this annotation."""
    if annotation is Any:
        return _literal(text)
    if annotation is bool:
        if text.lower() not in _TRUTHS:
            raise ValueError
        return _TRUTHS[text.lower()]
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind in (Union, UnionType):
        if NoneType in arguments and text.lower() == "none":
            return None
        (other,) = (argument for argument in arguments if argument is not NoneType)
        return _parse(text, other)
    if kind is Literal:
        if text not in arguments:
            raise ValueError
        return text
    if kind is tuple:
        return _parse_tuple(text, arguments)
    return annotation(text)


def _parse_tuple(text: str, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """From "1, 2" or "(1, 2)"; texts that hold commas need the latter, with quotes."""
    if text[:1] in ("(", "["):
        found = _literal(text)
        # Python reads brackets around a single value as that value.
        parts = [str(part) for part in (found if isinstance(found, list | tuple) else (found,))]
    else:
        parts = [part.strip() for part in text.split(",") if part]
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(parts)
    if len(parts) != len(kinds):
        raise ValueError
    return tuple(_parse(part, kind) for part, kind in zip(parts, kinds, strict=True))


def _literal(text: str) -> Any:
    """What Python reads as a value without computing anything."""
    if text.lower() == "none":
        return None
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError) as error:
        raise ValueError from error


def _wanted(annotation: Any) -> str:
    """What a value must be, for people."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return "none, or a value as Python writes it"
    if kind in (Union, UnionType):
        return " or ".join("none" if argument is NoneType else _wanted(argument) for argument in arguments)
    if kind is Literal:
        return f"one of {', '.join(arguments)}"
    if kind is tuple:
        each = _wanted(arguments[0])
        number = "any number of values" if arguments[-1] is ... else f"{len(arguments)} values"
        return f"{number} separated by commas, each {each}"
    return _WANTED[annotation]
