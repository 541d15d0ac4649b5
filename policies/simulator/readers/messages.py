"""Conversations as they lie in files, and the turns in them. Two shapes of record, free to mix:

    {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

one a line, or in one JSON list. Knows neither tokens nor times.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from policies.simulator.readers.files import READ_BYTES, json_lines, opened
from policies.simulator.trace import TraceError

LISTS = ("messages", "conversations", "conversation")
USERS = ("user", "human")
MODELS = ("assistant", "gpt", "chatgpt", "bot", "model", "function_call")
SYSTEMS = ("system", "developer")
_NOT_BLANK = re.compile(r"\S")


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    text: str


@dataclass(frozen=True, slots=True)
class TextTurn:
    """The messages that are new in a turn, and the answer; "" if the file has none."""

    messages: tuple[Message, ...]
    answer: str


def conversations(url: str) -> Iterator[list[TextTurn]]:
    """The turns of each conversation in which a user asks something. Raises TraceError."""
    for where, record in _records(url):
        messages = _messages(where, record)
        if any(message.role in USERS for message in messages):
            yield turns_of(messages)


def turns_of(messages: list[Message]) -> list[TextTurn]:
    """The model answers after every user message and after tool results; what it says first of all is no answer.

    Answers in a row are one. System messages and tool results belong to the turn whose answer follows them.
    """
    turns: list[TextTurn] = []
    new: list[Message] = []
    answers: list[str] = []
    for message in messages:
        if message.role in MODELS and _asks(new):
            answers.append(message.text)
            continue
        if answers or (_has_user(new) and message.role in (*USERS, *SYSTEMS)):
            turns.append(TextTurn(tuple(new), "\n\n".join(answers)))
            new, answers = [], []
        new.append(message)
    if _asks(new):
        turns.append(TextTurn(tuple(new), "\n\n".join(answers)))
    return turns


def _asks(new: list[Message]) -> bool:
    return any(message.role not in (*MODELS, *SYSTEMS) for message in new)


def _has_user(new: list[Message]) -> bool:
    return any(message.role in USERS for message in new)


# --- records ----------------------------------------------------------------------------------------------------------


def _messages(where: str, record: Any) -> list[Message]:
    key = next((key for key in LISTS if isinstance(record, dict) and isinstance(record.get(key), list)), None)
    if key is None:
        raise TraceError(f'{where}: no list of messages: put them under "messages" or "conversations"')
    messages = [_message(f"{where}: message {index}", item) for index, item in enumerate(record[key], start=1)]
    if isinstance(record.get("system"), str) and record["system"]:
        messages.insert(0, Message("system", record["system"]))
    return messages


def _message(where: str, item: Any) -> Message:
    role = item.get("role", item.get("from")) if isinstance(item, dict) else None
    if not isinstance(role, str):
        raise TraceError(f'{where} has no role: write {{"role": ..., "content": ...}} or {{"from": ..., "value": ...}}')
    content = item.get("content", item.get("value"))
    if content is None and item.get("tool_calls"):
        content = json.dumps(item["tool_calls"])
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in content)
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        raise TraceError(f"{where} has no text: its content must be a string or a list of text parts")
    return Message(role.strip().lower(), content)


def _records(url: str) -> Iterator[tuple[str, Any]]:
    """(where, record)"""
    with opened(url) as stream:
        is_list = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if is_list:
        yield from _list_items(url)
        return
    for number, record in json_lines(url):
        yield f"{url}:{number}", record


def _list_items(url: str) -> Iterator[tuple[str, Any]]:
    """Items of one JSON list, read piece by piece: a limit costs no more than what it takes."""
    decoder = json.JSONDecoder()
    with opened(url) as stream:
        text = _Text(io.TextIOWrapper(stream, encoding="utf-8-sig"))
        text.take("[")
        for number in range(1, 2**62):
            if text.next() == "]":
                return
            where = f"{url} item {number}"
            yield where, text.decoded(decoder, where)
            if not text.take(",") and text.next() != "]":
                raise TraceError(f"{where}: no comma and no ] after it: the list is not whole, copy or mend the file")


class _Text:
    """A stream of text, of which a part was read and not used yet."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream, self._text, self._position = stream, "", 0

    def next(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            found = _NOT_BLANK.search(self._text, self._position)
            if found is not None:
                self._position = found.start()
                return found.group()
            if not self._read_on():
                return ""

    def take(self, character: str) -> bool:
        """Goes on behind the next character if it is this one."""
        if self.next() != character:
            return False
        self._position += 1
        return True

    def decoded(self, decoder: json.JSONDecoder, where: str) -> Any:
        """The next JSON value; twice as much is read each time it is not whole. Raises TraceError."""
        while True:
            try:
                value, self._position = decoder.raw_decode(self._text, self._position)
            except (json.JSONDecodeError, RecursionError) as error:
                if not self._read_on():
                    what = f"{where}: not JSON ({getattr(error, 'msg', 'too deep')})"
                    raise TraceError(f"{what}: mend it, or write one conversation per line") from None
            else:
                return value

    def _read_on(self) -> bool:
        """At least doubles what is ahead; False at the end of the stream."""
        ahead = self._text[self._position :]
        piece = self._stream.read(max(READ_BYTES, len(ahead)))
        self._text, self._position = ahead + piece, 0
        return bool(piece)
