"""Reading conversations: ShareGPT and OpenAI messages, from any file.

Two shapes of record, told apart by their keys and free to mix:

    {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}     ShareGPT
    {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}  OpenAI

A file holds one record per line (JSONL, read as a stream) or one JSON list of records (its text is held in memory);
plain, `.gz` or `.zst`; at a local path or any fsspec URL. A record that cannot be used is yielded as a `Problem` in its
place: the caller decides whether to count it, skip it or stop. Only a file that cannot be read at all raises.

How messages become turns (`exchanges`): the model answers after every user message, so two user messages in a
row are two turns (MT-Bench records its questions that way). Tool results and system messages belong to the turn whose
answer follows them; answers in a row are one answer of several paragraphs.

This file knows neither tokens nor chat templates.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import zstandard

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Names of roles in the wild, and ours."""


class InputError(ValueError):
    """A file that cannot be read as conversations at all; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation with at least one user message, which no answer precedes. `where` is "file:line"."""

    id: str
    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """One turn: the messages that are new in it, and the answer that was recorded, if one was."""

    messages: tuple[Message, ...]
    recorded: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that was passed over: where it stands, what is wrong with it, what to do about it."""

    where: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} ({self.advice})"


class _BadRecordError(Exception):
    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.what, self.advice = what, advice


def read_conversations(url: str, limit: int | None = None) -> Iterator[Conversation | Problem]:
    """The conversations of a file in its order, at most `limit` of them (problems do not count).

    The file is opened here: a missing, empty or unreadable one raises InputError at once. While iterating, InputError
    is raised where compressed data is damaged.
    """
    lines = _numbered_lines(url)
    try:
        first = next(lines)
    except StopIteration:
        raise InputError(f"{url} is empty: write one conversation per line (JSONL) or a JSON list of them") from None
    lines = itertools.chain([first], lines)
    records = _json_list(url, lines) if first[1].startswith(b"[") else _json_lines(url, lines)
    return _conversations(url, records, limit)


def exchanges(conversation: Conversation) -> list[Exchange]:
    """The turns of a conversation in order; messages without a user's among them (a tool result) are a turn as well."""
    found: list[Exchange] = []
    new: list[Message] = []
    answer: list[str] = []
    for message in conversation.messages:
        if message.role == "assistant":
            answer.append(message.content)
            continue
        asked = any(earlier.role == "user" for earlier in new)
        if answer or (asked and message.role in ("user", "system")):
            found.append(Exchange(tuple(new), "\n\n".join(answer) if answer else None))
            new, answer = [], []
        new.append(message)
    found.append(Exchange(tuple(new), "\n\n".join(answer) if answer else None))
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def _numbered_lines(url: str) -> Iterator[tuple[int, bytes]]:
    """(line number, line without its blanks around it), blank lines left out."""
    num_read = 0
    try:
        with fsspec.open(url, "rb") as raw, _decompressed(url, raw) as file:
            for line in file:
                num_read += 1
                stripped = line.removeprefix(b"\xef\xbb\xbf").strip() if num_read == 1 else line.strip()
                if stripped:
                    yield num_read, stripped
    except FileNotFoundError:
        raise InputError(f"{url} does not exist: check the path (relative to where the command runs) or URL") from None
    except IsADirectoryError:
        raise InputError(f"{url} is a folder: name one of its files") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{url}:{num_read + 1}: compressed data is damaged ({error}): copy the file again") from error
    except (OSError, ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be read: {error}") from error


def _decompressed(url: str, raw: BinaryIO) -> BinaryIO | io.BufferedIOBase:
    if url.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if url.endswith((".zst", ".zstd")):
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def _json_lines(url: str, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Any] | Problem]:
    for number, line in lines:
        where = f"{url}:{number}"
        try:
            yield number, json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield _not_utf8(where, error)
        except (json.JSONDecodeError, RecursionError) as error:
            advice = "one whole JSON object per line; a file of one JSON list must begin with ["
            yield Problem(where=where, what=f"not JSON: {error}", advice=advice)


def _json_list(url: str, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Any] | Problem]:
    """Items of a JSON list with the line each begins on. The first item that is not JSON ends the reading."""
    numbers: list[int] = []
    parts: list[str] = []
    for number, line in lines:
        try:
            parts.append(line.decode())
        except UnicodeDecodeError as error:
            yield _not_utf8(f"{url}:{number}", error)
            return
        numbers.append(number)
    yield from _list_items(url, "\n".join(parts), numbers)


def _list_items(url: str, text: str, numbers: list[int]) -> Iterator[tuple[int, Any] | Problem]:
    """`numbers` are the line numbers in the file of the lines of `text`, which begins with [."""
    decoder = json.JSONDecoder()
    position, index = _skip_blanks(text, 1), 0
    line = text.count("\n", 0, position)
    while text[position : position + 1] != "]":
        start = position
        try:
            item, position = decoder.raw_decode(text, position)
            position = _skip_blanks(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("no , or ] after it", text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            what = f"item {index + 1} of the list is not JSON: {getattr(error, 'msg', error)}"
            advice = "nothing after it was read; mend it, or write one conversation per line"
            yield Problem(f"{url}:{numbers[line]}", what, advice)
            return
        yield numbers[line], item
        if text[position] == ",":
            position = _skip_blanks(text, position + 1)
        line += text.count("\n", start, position)
        index += 1


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _not_utf8(where: str, error: UnicodeDecodeError) -> Problem:
    what = f"not UTF-8 (byte 0x{error.object[error.start]:02x} at column {error.start + 1})"
    return Problem(where=where, what=what, advice="convert the file to UTF-8, for example with iconv")


# --- records ----------------------------------------------------------------------------------------------------------


def _conversations(
    url: str, records: Iterator[tuple[int, Any] | Problem], limit: int | None
) -> Iterator[Conversation | Problem]:
    first_seen: dict[str, str] = {}
    num_yielded = 0
    while limit is None or num_yielded < limit:
        record = next(records, None)
        if record is None:
            return
        if isinstance(record, Problem):
            yield record
            continue
        number, value = record
        where = f"{url}:{number}"
        try:
            conversation = _conversation(value, where, f"{url.rsplit('/', 1)[-1]}:{number}")
            if conversation.id in first_seen:
                what = f"id {conversation.id!r} was already used at {first_seen[conversation.id]}"
                raise _BadRecordError(what, "give every conversation its own id, or leave ids out")
        except _BadRecordError as error:
            yield Problem(where=where, what=error.what, advice=error.advice)
            continue
        first_seen[conversation.id] = where
        num_yielded += 1
        yield conversation


def _conversation(record: Any, where: str, own_id: str) -> Conversation:
    if not isinstance(record, dict):
        raise _BadRecordError(f"a {_kind(record)} instead of an object", 'write {"messages": [...]}')
    key = next((key for key in ("messages", "conversations", "conversation") if key in record), None)
    if key is None:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise _BadRecordError(f"no messages (keys: {keys})", 'put them under "messages" or "conversations"')
    if not isinstance(record[key], list):
        raise _BadRecordError(f'"{key}" is a {_kind(record[key])}', "it must be a list of messages")
    messages = [_message(item, index) for index, item in enumerate(record[key], start=1)]
    if isinstance(record.get("system"), str) and record["system"]:  # some ShareGPT files keep it beside the list
        messages.insert(0, Message("system", record["system"]))
    _check_order(messages)
    found_id = record.get("id")
    if isinstance(found_id, bool) or not isinstance(found_id, str | int | None):
        raise _BadRecordError(f'"id" is a {_kind(found_id)}', "use a string or a number, or leave it out")
    return Conversation(id=own_id if found_id in (None, "") else str(found_id), messages=tuple(messages), where=where)


def _check_order(messages: list[Message]) -> None:
    roles = [message.role for message in messages if message.role != "system"]
    if not messages:
        raise _BadRecordError("the conversation is empty", "give it a user message or remove it")
    if "user" not in roles:
        raise _BadRecordError("no user message", "a conversation needs something to answer")
    if roles[0] == "assistant":
        raise _BadRecordError("an answer comes first", "put the user message before it, or remove it")
    if roles[0] == "tool":
        raise _BadRecordError("a tool result comes first", "put the user message and the call before it")


def _message(item: Any, index: int) -> Message:
    if not isinstance(item, dict):
        raise _BadRecordError(f"message {index} is a {_kind(item)}", 'write {"role": ..., "content": ...}')
    name = item.get("role", item.get("from"))
    if not isinstance(name, str):
        raise _BadRecordError(f'message {index} has no "role" (or "from")', f"use one of {', '.join(sorted(ROLES))}")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise _BadRecordError(
            f"message {index} has the unknown role {name!r}", f"use one of {', '.join(sorted(ROLES))}"
        )
    content = item.get("content", item.get("value"))
    if content is None and role == "assistant" and item.get("tool_calls"):
        return Message(role, json.dumps(item["tool_calls"], ensure_ascii=False))
    return Message(role, _text(content, index))


def _text(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        found = f'message {index} has no "content" (or "value")' if content is None else ""
        what = found or f"the content of message {index} is a {_kind(content)}"
        raise _BadRecordError(what, "it must be a string or a list of text parts")
    parts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, dict) else _kind(part)
            raise _BadRecordError(f"message {index} has a part of type {kind!r}", "only text parts can be answered")
        parts.append(text)
    return "".join(parts)


def _kind(value: Any) -> str:
    """JSON's name for it."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
