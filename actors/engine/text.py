"""From token ids to text, one token at a time.

What a stream has given is never taken back, and all of it together is
`tokenizer.decode(all ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`, cut before a stop string.
A token costs the same at the start of an answer as at its end.

    tokens --> decoder: whole characters only --> stop filter: no part of a stop string --> caller

Two decoders. Byte-level BPE (Llama 3, Qwen, GPT-NeoX, ...): a token is a run of bytes and the text is their UTF-8.
Anything else (SentencePiece and friends): the tokenizer itself decodes the few ids that are not settled yet, after an
anchor token, so that it does not strip the space of a first word. There a run of byte tokens (`<0xE4>`) is settled when
it ends, because one bad byte spoils the tokenizer's decoding of the whole run; a run of more than MAX_PENDING tokens is
settled as it stands.

This file knows tokenizers and stop strings; it does not know about end tokens, turns or models.
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

REPLACEMENT = "\ufffd"
MAX_PENDING = 64
"""Unsettled tokens a window decoder keeps at most."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoder(Protocol):
    """Turns ids into settled text."""

    def push(self, token_id: int) -> tuple[str, list[int]]:
        """Text that is settled by this id, and for each id settled by it how many characters of that text belong to it
        or to ids before it (one more than the text has: it holds a part of the next character)."""

    def finish(self) -> tuple[str, list[int]]:
        """The same for all that is still pending."""


@dataclass(frozen=True)
class Vocabulary:
    """What the decoders need of a tokenizer; found once per tokenizer."""

    tokenizer: Any
    skipped: frozenset[int]
    """Special tokens: no text."""
    byte_level: bool
    anchor: tuple[int, ...]
    """Ids of an ordinary word, to decode others behind."""
    anchor_text: str

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        known = _known.get(tokenizer)
        if known is None:
            known = _known[tokenizer] = cls._inspect(tokenizer)
        return known

    @classmethod
    def _inspect(cls, tokenizer: Any) -> Vocabulary:
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        anchor = tuple(tokenizer.encode("a", add_special_tokens=False))
        return cls(
            tokenizer=tokenizer,
            skipped=frozenset(added | set(tokenizer.all_special_ids)),
            byte_level=_is_byte_level(tokenizer),
            anchor=anchor,
            anchor_text=_decode(tokenizer, list(anchor)),
        )

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for an id it does not have (padding of the model's matrix)."""
        try:
            token: str | None = self.tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError):
            return None
        return token


_known: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(backend, "decoder", None) is None:
        return False
    state = json.loads(backend.decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    return [part["type"] for part in parts] == ["ByteLevel"]


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable Latin-1 is itself, other bytes are U+0100..."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class ByteLevelDecoder:
    """Byte-level BPE: bytes are UTF-8; invalid ones become U+FFFD as soon as they cannot be completed any more."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> tuple[str, list[int]]:
        token = None if token_id in self._vocabulary.skipped else self._vocabulary.token(token_id)
        text = self._utf8.decode(_bytes_of(token)) if token else ""
        pending = bool(self._utf8.getstate()[0])
        return text, [len(text) + pending]

    def finish(self) -> tuple[str, list[int]]:
        return self._utf8.decode(b"", final=True), []


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # an added token is spelt as it is
        return token.encode()


class WindowDecoder:
    """Any tokenizer: it decodes the pending ids itself, behind an anchor whose text is taken off again.

    Pending are either a run of byte tokens, or ids whose text ends in U+FFFD (a byte-level tokenizer not known as one).
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pending: list[int] = []
        self._run: list[bytes] = []  # of a pending run, the byte of each id; b"" for a special token inside
        self._first = True  # nothing was settled: the tokenizer may strip the leading space of what comes

    def push(self, token_id: int) -> tuple[str, list[int]]:
        token = None if token_id in self._vocabulary.skipped else self._vocabulary.token(token_id)
        byte = _BYTE_TOKEN.fullmatch(token) if token else None
        if token is None:
            return self._push_silent(token_id)
        if byte is None:
            return self._push_text(token_id)
        text, ends = ("", []) if self._run else self.finish()
        self._pending.append(token_id)
        self._run.append(bytes.fromhex(byte[1]))
        if len(self._pending) < MAX_PENDING:
            return text, ends
        return self._settle_long_run()

    def finish(self) -> tuple[str, list[int]]:
        if not self._pending:
            return "", []
        text = self._decode(self._pending)
        ends = _ends_of_run(self._run, text) if self._run else [len(text)] * len(self._pending)
        self._pending, self._run = [], []
        self._first = False
        return text, ends

    def _push_silent(self, token_id: int) -> tuple[str, list[int]]:
        """A special token or an unknown id: no text, and it does not end a run."""
        if not self._pending:
            return "", [0]
        self._pending.append(token_id)
        if self._run:
            self._run.append(b"")
        return "", []

    def _push_text(self, token_id: int) -> tuple[str, list[int]]:
        before, ends = self.finish() if self._run else ("", [])
        self._pending.append(token_id)
        if self._decode(self._pending).endswith(REPLACEMENT) and len(self._pending) < MAX_PENDING:
            return before, ends
        text, more = self.finish()
        return before + text, ends + [len(before) + end for end in more]

    def _settle_long_run(self) -> tuple[str, list[int]]:
        """All of the run but a character that is still incomplete at its end."""
        num_open = _num_incomplete(b"".join(self._run))
        cut = len(self._run)
        while num_open > 0 and cut > 1:
            cut -= 1
            num_open -= len(self._run[cut])
        ids, run = self._pending[cut:], self._run[cut:]
        self._pending, self._run = self._pending[:cut], self._run[:cut]
        settled = self.finish()
        self._pending, self._run = ids, run
        return settled

    def _decode(self, token_ids: list[int]) -> str:
        vocabulary = self._vocabulary
        known = [i for i in token_ids if vocabulary.token(i) is not None]
        if self._first:
            return _decode(vocabulary.tokenizer, known)
        return _decode(vocabulary.tokenizer, [*vocabulary.anchor, *known])[len(vocabulary.anchor_text) :]


def _num_incomplete(data: bytes) -> int:
    """How many bytes at the end of `data` are the beginning of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])


def _ends_of_run(run: list[bytes], text: str) -> list[int]:
    """For each byte of a run decoded to `text`, how many characters it and those before it have a part in."""
    ends: list[int] = []
    for byte in run:
        starts = byte != b"" and (len(text) == len(b"".join(run)) or byte[0] & 0xC0 != 0x80)
        ends.append((ends[-1] if ends else 0) + starts)
    return ends if ends[-1] == len(text) else [len(text)] * len(run)


class TextStream:
    """The text of one answer as it grows. `push` and `finish` return what became certain.

    Text that may be the start of a stop string is held back. The stop string that is complete first ends the answer (of
    several, the one that starts first), wherever token borders lie; the text is cut where it starts.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        vocabulary = Vocabulary.of(tokenizer)
        self._decoder: Decoder = ByteLevelDecoder(vocabulary) if vocabulary.byte_level else WindowDecoder(vocabulary)
        self._stop = stop
        self._certain: list[str] = []
        self._num_certain = 0
        self._held = ""  # follows the certain text; may be the start of a stop string
        self._ends: list[int] = []  # per settled token: characters of the text it and its predecessors take part in
        self._num_tokens = 0
        self._finished = False
        self.stopped = False
        """A stop string was found: nothing more comes."""

    @property
    def text(self) -> str:
        """All that is certain so far."""
        return "".join(self._certain)

    @property
    def num_tokens_kept(self) -> int:
        """How many of the pushed tokens lie wholly before the cut; all of them while there is none."""
        return bisect_right(self._ends, self._num_certain) if self.stopped else self._num_tokens

    def push(self, token_id: int) -> str:
        """The text that this token makes certain. Empty, and nothing changes, after a stop string or `finish`."""
        if self.stopped or self._finished:
            return ""
        self._num_tokens += 1
        return self._settle(*self._decoder.push(token_id))

    def finish(self) -> str:
        """No more tokens come: the rest of the text. An incomplete character becomes U+FFFD."""
        if self.stopped or self._finished:
            return ""
        self._finished = True
        text = self._settle(*self._decoder.finish())
        rest, self._held = self._held, ""  # already empty if a stop string was found
        return text + self._emit(rest)

    def _settle(self, piece: str, ends: list[int]) -> str:
        start = self._num_certain + len(self._held)
        self._ends += [start + end for end in ends]
        window = self._held + piece
        cut = self._find_stop(window) if piece else None
        if cut is not None:
            self.stopped, self._held = True, ""
            return self._emit(window[:cut])
        keep = self._possible_stop(window)
        self._held = window[len(window) - keep :]
        return self._emit(window[: len(window) - keep])

    def _emit(self, text: str) -> str:
        if text:
            self._certain.append(text)
            self._num_certain += len(text)
        return text

    def _find_stop(self, window: str) -> int | None:
        """Where the stop string that is complete first begins."""
        found = [(at + len(stop), at) for stop in self._stop if (at := window.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible_stop(self, window: str) -> int:
        """Length of the longest end of `window` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(window)), 0, -1):
            if any(stop.startswith(window[-length:]) for stop in self._stop):
                return length
        return 0
