"""Conversations as token tuples, and the prompts and chunks that follow from them.

Keys are made from the tokens themselves, so two conversations share keys exactly where they share a prefix, and a test
can look up which tokens stand behind a key.
"""

from __future__ import annotations

from collections.abc import Iterable

from policies.messages import ChunkInfo, Mark, Turn

C = 4  # tokens of a full chunk
TOKEN_BYTES = 10

_tokens_of: dict[str, tuple[int, ...]] = {}
_keys: dict[tuple[int, ...], str] = {}

Tokens = tuple[int, ...]


def text(name: int, num_tokens: int, after: Tokens = ()) -> Tokens:
    """`num_tokens` tokens, of which those beyond `after` are found nowhere else but in the text of that name."""
    return after + tuple(name * 1000 + position for position in range(len(after), num_tokens))


def key_of(tokens: Tokens) -> str:
    """The key of the prefix `tokens`."""
    key = _keys.get(tokens)
    if key is None:
        key = _keys[tokens] = f"k{len(_keys):06d}"
        _tokens_of[key] = tokens
    return key


def tokens_of(key: str) -> Tokens:
    """The prefix behind a key."""
    return _tokens_of[key]


def bytes_of(key: str) -> int:
    """The size of the chunk of that key."""
    return ((len(tokens_of(key)) - 1) % C + 1) * TOKEN_BYTES


def marks_of(tokens: Tokens, cuts: Iterable[int] = ()) -> tuple[Mark, ...]:
    """Marks at every multiple of C, at the cuts and at the end."""
    ends = {*range(C, len(tokens) + 1, C), *(cut for cut in cuts if 0 < cut <= len(tokens)), len(tokens)}
    return tuple(Mark(end, key_of(tokens[:end])) for end in sorted(ends))


def chunk_of(tokens: Tokens, start: int, cuts: Iterable[int] = ()) -> ChunkInfo:
    """The chunk that begins at `start` and goes on for C tokens, or to the end of the text."""
    end = min(start + C, len(tokens))
    ends = sorted({*(cut for cut in cuts if start < cut < end), end})
    return ChunkInfo(
        key=key_of(tokens[:end]),
        parent=key_of(tokens[:start]) if start else None,
        start=start,
        end=end,
        num_bytes=(end - start) * TOKEN_BYTES,
        marks=tuple(Mark(end, key_of(tokens[:end])) for end in ends),
    )


def chunks_of(tokens: Tokens, start: int = 0, cuts: Iterable[int] = ()) -> tuple[ChunkInfo, ...]:
    """All chunks of a text from `start` on, parents first."""
    cuts = tuple(cuts)
    return tuple(chunk_of(tokens, at, cuts) for at in range(start - start % C, len(tokens), C))


def turn_of(
    turn_id: str,
    tokens: Tokens,
    *,
    session_id: str = "",
    cuts: Iterable[int] = (),
    max_new_tokens: int = 4,
    priority: int = 0,
    reuse: bool = True,
    drift_at: int | None = None,
    affinity: str | None = None,
) -> Turn:
    """A turn with this prompt; its session is named like the part of the turn_id before the slash."""
    return Turn(
        turn_id=turn_id,
        session_id=session_id or turn_id.partition("/")[0],
        prompt=marks_of(tokens, cuts),
        num_prompt_tokens=len(tokens),
        max_new_tokens=max_new_tokens,
        priority=priority,
        reuse=reuse,
        drift_at=drift_at,
        affinity=affinity,
    )
