"""Choices written in one line: `name:field=value,field=value` becomes an instance of a frozen dataclass.

    chat:sessions=1000,seed=3   ->   Chat(sessions=1000, seed=3)

Knows neither readers nor generators; only fields whose default is an int, a float, a bool or a str can be given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def from_spec(what: str, kinds: Mapping[str, type[T]], spec: str) -> T:
    """The instance `spec` describes; ValueError lists the names, or the fields, that are known.

    `what`: a word for messages, such as "format".
    """
    name, _, given = spec.partition(":")
    kind = kinds.get(name.strip())
    if kind is None:
        raise ValueError(f"unknown {what} {name.strip()!r}: choose one of {', '.join(sorted(kinds))}")
    defaults = fields_of(kind)
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in given.split(","))):
        field, equals, text = (part.strip() for part in item.partition("="))
        if not equals or field not in defaults:
            known = ", ".join(f"{known}={default}" for known, default in defaults.items()) or "nothing"
            problem = f"unknown parameter {field!r}" if equals else f"{item!r} is not parameter=value"
            raise ValueError(f"{what} {name.strip()!r}: {problem}; it takes {known}")
        if field in values:
            raise ValueError(f"{what} {name.strip()!r}: {field} is given twice; give it once")
        values[field] = _value(f"{what} {name.strip()!r}: {field}", text, defaults[field])
    return kind(**values)


def fields_of(kind: type) -> dict[str, Any]:
    """The fields that a spec may give, with their defaults."""
    return {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if isinstance(field.default, (int, float, str))  # bool is an int
    }


def _value(where: str, text: str, default: object) -> object:
    """`text` as the type of `default`."""
    try:
        if isinstance(default, bool):
            return _YES_NO[text.lower()]
        if isinstance(default, int):
            return int(text)
        return float(text) if isinstance(default, float) else text
    except (ValueError, KeyError):
        kind = {bool: "yes or no", int: "a whole number", float: "a number"}[type(default)]
        raise ValueError(f"{where} is {text!r}: give {kind}, for example {default}") from None
