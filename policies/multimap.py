"""Keys to one or more others. Most have one, which costs no container of its own: with millions of keys that counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice


class Multimap:
    """For every key the values added to it, each once, in the order in which they came.

    {"a": "x", "b": {"x": None, "y": None}}     a has one value, b has two
    """

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: dict[str, str | dict[str, None]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> Iterator[tuple[str, Sequence[str]]]:
        return ((key, self.get(key)) for key in self._values)

    def add(self, key: str, value: str) -> None:
        """Again is fine."""
        values = self._values.get(key)
        if values is None:
            self._values[key] = value
        elif isinstance(values, dict):
            values[value] = None
        elif values != value:
            self._values[key] = {values: None, value: None}

    def discard(self, key: str, value: str) -> None:
        """Not there is fine."""
        values = self._values.get(key)
        if isinstance(values, dict):
            values.pop(value, None)
            if not values:
                del self._values[key]
        elif values == value:
            del self._values[key]

    def get(self, key: str, limit: int | None = None) -> Sequence[str]:
        """The first values of the key, all without a limit; none for an unknown one."""
        values = self._values.get(key)
        if values is None:
            return ()
        return (values,) if isinstance(values, str) else tuple(islice(values, limit))
