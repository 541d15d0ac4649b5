"""The event log: everything that determined a scheduler's answers, and the answers, one JSON object a line.

    {"event_log": 1, "config": {...}, "began_unix_s": ...}                a header: a new scheduler, a new life
    {"now": 12.5, "event": {"type": "TurnStarted", ...}, "commands": [...]}    what it heard, when, and what it said
    {"now": 12.6, "event": {...}, "commands": [], "benched": ["Slow.victims"]}  from then on the safe default decides
    {"now": 12.7, "event": {...}, "commands": [], "error": "AssertionError: ..."}    it broke here, and ended
    {"stopped": "max_bytes: ..."}                                         not recorded any further in this life

How a value is written follows from the dataclasses of messages.py alone: an object with the fields by name, tuples as
arrays, enums by value; an event or command also says its "type". Reading is strict: an unknown type or field, a missing
field without a default or a value of the wrong kind is an error that names the line. A field that has a default may be
missing: logs written before the field existed can be read. Opens no file for writing: actors/recorder.py does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from policies import messages as m

VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A scheduler with this configuration began; what follows, up to the next header, is its life."""

    config: m.SchedulerConfig
    began_unix_s: float = 0.0  # wall clock, for people; `now` has an origin of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event, when it was heard, and what was answered."""

    now: float
    event: m.Event
    commands: tuple[m.Command, ...]
    benched: tuple[str, ...] = ()  # policies' verbs found too slow meanwhile (plugins.Guard): replaced from now on
    error: str = ""  # the scheduler raised this, and its life ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """Nothing more was recorded of this life."""

    stopped: str  # why


Record = Header | Entry | Stopped


# --- writing ----------------------------------------------------------------------------------------------------------


def write_line(record: Record) -> bytes:
    """The record as a line, with its end. TypeError for a value that no field of messages.py may hold."""
    tree = _fields_of(record)
    if isinstance(record, Header):
        tree = {"event_log": VERSION, **tree}
    elif isinstance(record, Entry):
        tree = {name: value for name, value in tree.items() if value or name not in ("benched", "error")}
    return (_encoder.encode(tree) + "\n").encode("ascii")


def to_json(value: m.Event | m.Command) -> Any:
    """The value as JSON values (dict, list, str, int, float, bool, None)."""
    return json.loads(_encoder.encode(value))


def _fields_of(value: object) -> dict[str, Any]:
    """What json does not know how to write: a dataclass. Enums are strings, tuples arrays."""
    names = _NAMES.get(type(value))
    if names is None:
        raise TypeError(f"{value!r} cannot be written to an event log: it is neither a message nor a part of one")
    tree = {name: getattr(value, name) for name in names}
    return {"type": type(value).__name__, **tree} if type(value) in _TAGGED else tree


_encoder = json.JSONEncoder(default=_fields_of, separators=(",", ":"), check_circular=False)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_log(file: str) -> Iterator[tuple[int, Record]]:
    """The records of a file with their line numbers; ValueError (see `read_lines`), OSError if it cannot be read."""
    with open(file, "rb") as lines:
        yield from read_lines(lines, file)


def read_lines(lines: Iterable[bytes], name: str = "event log") -> Iterator[tuple[int, Record]]:
    """The records of these lines, numbered from 1. Reads as it goes; nothing is kept.

    A last line without its end is what a killed process leaves: it comes as `Stopped`. Any other line that cannot be
    read raises ValueError, which says where and what to do.
    """
    for number, line in enumerate(lines, 1):
        is_torn = not line.endswith(b"\n")
        try:
            record = _read_line(line)
        except ValueError as error:
            if is_torn and number > 1:
                yield number, Stopped(stopped="the last line is torn: its process was killed while writing it")
                return
            raise ValueError(f"{name}:{number}: {error}") from None
        if number == 1 and not isinstance(record, Header):
            raise ValueError(f'{name}:1: not an event log: its first line must be a header, {{"event_log": {VERSION}')
        yield number, record


def from_json(tree: object) -> m.Event | m.Command:
    """The inverse of `to_json`; ValueError says what is wrong with it."""
    message: m.Event | m.Command = _read_message(tree)
    return message


def _read_line(line: bytes) -> Record:
    try:
        tree = json.loads(line)
    except ValueError as error:
        advice = "the file is damaged; to use what comes before, cut it off here"
        raise ValueError(f"not a line of JSON ({error}): {advice}") from None
    if not isinstance(tree, dict):
        _refuse(tree, "a record of an event log; is this the right file?")
    if "event_log" in tree:
        version = tree.pop("event_log")
        if version != VERSION:
            raise ValueError(f"written in version {version!r}, but version {VERSION} is read here: use its own Reprise")
        return _read_header(tree)  # type: ignore[no-any-return]
    return _read_stopped(tree) if "stopped" in tree else _read_entry(tree)  # type: ignore[no-any-return]


# --- decoders, made from the types ------------------------------------------------------------------------------------

Decode = Callable[[Any], Any]


def _decoder(hint: Any) -> Decode:
    """How JSON values become values of this type. TypeError for a type that messages.py does not use so far."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        members = [member for member in arguments if member is not NoneType]
        decode = _decoder(members[0]) if len(members) == 1 else _one_of(members)
        return (lambda tree: None if tree is None else decode(tree)) if NoneType in arguments else decode
    if origin is tuple:
        return _array_of(arguments[0]) if arguments[1:] == (...,) else _row_of(arguments)
    if isinstance(hint, type) and is_dataclass(hint):
        return _object_of(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return lambda tree: _member_of(hint, tree)
    if hint in _SCALARS:
        kinds, words = _SCALARS[hint]
        return lambda tree: tree if type(tree) in kinds else _refuse(tree, words)
    raise TypeError(f"policies/eventlog.py does not know how to read {hint!r}")


_SCALARS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a string"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    bool: ((bool,), "true or false"),
}


def _refuse(tree: object, wanted: str) -> Any:
    raise ValueError(f"{_short(tree)} is not {wanted}")


def _short(tree: object) -> str:
    text = repr(tree)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _member_of(enum: type[StrEnum], tree: object) -> StrEnum:
    try:
        return enum(tree)  # type: ignore[arg-type]
    except ValueError:
        return _refuse(tree, f"one of {', '.join(enum)}")  # type: ignore[no-any-return]


def _array_of(hint: Any) -> Decode:
    decode = _decoder(hint)
    return lambda tree: tuple(map(decode, tree)) if type(tree) is list else _refuse(tree, "an array")


def _row_of(hints: tuple[Any, ...]) -> Decode:
    decoders = [_decoder(hint) for hint in hints]

    def decode(tree: Any) -> Any:
        if type(tree) is not list or len(tree) != len(decoders):
            _refuse(tree, f"an array of {len(decoders)}")
        return tuple(decode(part) for decode, part in zip(decoders, tree))

    return decode


def _object_of(cls: Any) -> Decode:
    hints = get_type_hints(cls)
    decoders = {field.name: _decoder(hints[field.name]) for field in fields(cls)}
    required = {field.name for field in fields(cls) if field.default is field.default_factory is MISSING}

    def decode(tree: Any) -> Any:
        if type(tree) is not dict:
            _refuse(tree, f"an object: a {cls.__name__}")
        if not required <= tree.keys() <= decoders.keys():
            _explain_names(cls.__name__, tree.keys(), required, decoders.keys())
        values = {}
        for name, part in tree.items():
            try:
                values[name] = decoders[name](part)
            except ValueError as error:
                raise ValueError(f"{cls.__name__}.{name}: {error}") from None
        return cls(**values)

    return decode


def _explain_names(name: str, given: Iterable[str], required: Iterable[str], known: Iterable[str]) -> None:
    missing, unknown = sorted(set(required) - set(given)), sorted(set(given) - set(known))
    if unknown:
        advice = f"its fields are {', '.join(known)}; a newer Reprise may have written it"
        raise ValueError(f"{name} has no field {unknown[0]!r}: {advice}")
    raise ValueError(f"{name} lacks {', '.join(missing)}: the line was changed, or another Reprise wrote it")


def _one_of(classes: Iterable[Any]) -> Decode:
    """An object whose "type" says which one it is."""
    decoders = {cls.__name__: _object_of(cls) for cls in classes}

    def decode(tree: Any) -> Any:
        if type(tree) is not dict or "type" not in tree:
            _refuse(tree, 'an object with a "type"')
        name = tree["type"]
        if not isinstance(name, str) or name not in decoders:
            raise ValueError(f"unknown type {_short(name)}: known are {', '.join(decoders)}")
        return decoders[name]({key: part for key, part in tree.items() if key != "type"})

    return decode


def _parts_of(hint: Any, found: dict[Any, tuple[str, ...]]) -> dict[Any, tuple[str, ...]]:
    """All dataclasses that a value of this type may hold, with the names of their fields."""
    if isinstance(hint, type) and is_dataclass(hint) and hint not in found:
        found[hint] = tuple(field.name for field in fields(hint))
        for part in get_type_hints(hint).values():
            _parts_of(part, found)
    for argument in get_args(hint):
        _parts_of(argument, found)
    return found


_TAGGED = frozenset(get_args(m.Event) + get_args(m.Command))
_NAMES = _parts_of(Record, {})
_read_message = _decoder(m.Event | m.Command)
_read_header, _read_entry, _read_stopped = map(_decoder, (Header, Entry, Stopped))
