"""Conversations of ShareGPT's shape, lengths only: from the shared trace, or generated like it.

Source of the shape: CachedAttention (USENIX ATC '24): 5.75 turns a conversation, a window of 4K tokens, half of it kept
when it overflows. Knows no model, no tokens and no clock.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

TRACE = "sharegpt_like_generated.parquet"
WINDOW = 4096
MEAN_TURNS, MAX_TURNS = 5.75, 40
NEW_TOKENS = (47.0, 1.08, 1500)
"""Median, sigma and maximum of a log-normal law, as of the trace's messages."""
OUTPUT_TOKENS = (217.0, 0.77, 1200)


@dataclass(frozen=True, slots=True)
class TurnShape:
    """A message of the user, and its answer."""

    new_tokens: int
    output_tokens: int


Shape = tuple[TurnShape, ...]
"""One conversation."""


@dataclass(frozen=True)
class Conversations:
    shapes: tuple[Shape, ...]
    window: int
    source: str
    """In words: where they are from."""

    @property
    def num_turns(self) -> int:
        return sum(map(len, self.shapes))

    def scaled(self, scale: float, window_limit: int) -> Conversations:
        """All lengths times `scale`, the window's too. A window beyond the limit is cut to it, and turns to half."""
        window = min(round(self.window * scale), window_limit)
        scale_one = _Scale(scale, window // 2)
        shapes = tuple(tuple(map(scale_one, shape)) for shape in self.shapes)
        return replace(self, shapes=shapes, window=window)


@dataclass(frozen=True)
class _Scale:
    factor: float
    limit: int

    def __call__(self, turn: TurnShape) -> TurnShape:
        return TurnShape(self._length(turn.new_tokens), self._length(turn.output_tokens))

    def _length(self, num_tokens: int) -> int:
        return min(max(1, round(num_tokens * self.factor)), self.limit)


def num_dropped(num_history: int, turn: TurnShape, window: int) -> int:
    """How many of the oldest tokens this turn's prompt leaves out: none while the turn fits into the window, else so
    many that half a window of prompt is left."""
    num_prompt = num_history + turn.new_tokens
    if num_prompt + turn.output_tokens <= window:
        return 0
    return min(num_history, max(0, num_prompt - window // 2))


def conversations(folder: Path | None, count: int) -> Conversations:
    """The first `count` of the trace in `folder`; generated ones if it is not there."""
    if folder is not None and (folder / TRACE).is_file():
        return Conversations(_read(folder / TRACE, count), WINDOW, f"the first {count} sessions of {TRACE}")
    return Conversations(_generated(count), WINDOW, f"{count} sessions generated in the shape of ShareGPT")


def _read(path: Path, count: int) -> tuple[Shape, ...]:
    import pyarrow.parquet as parquet

    columns = ("session_id", "input_tokens", "output_tokens")
    table = parquet.read_table(path, columns=list(columns))
    sessions: dict[int, list[tuple[int, int]]] = {}
    for session, num_input, num_output in zip(*(table.column(name).to_pylist() for name in columns)):
        sessions.setdefault(session, []).append((num_input, num_output))
    return tuple(_shape(turns) for turns, _ in zip(sessions.values(), range(count)))


def _shape(turns: Iterable[tuple[int, int]]) -> Shape:
    """From whole inputs to what is new in them. After a truncation the trace does not tell: the usual length then."""
    shape: list[TurnShape] = []
    num_history = 0
    for num_input, num_output in turns:
        num_new = num_input - num_history
        shape.append(TurnShape(num_new if num_new > 0 else round(NEW_TOKENS[0]), num_output))
        num_history = num_input + num_output
    return tuple(shape)


def _generated(count: int, seed: int = 0) -> tuple[Shape, ...]:
    chance = random.Random(seed)
    return tuple(_one(chance) for _ in range(count))


def _one(chance: random.Random) -> Shape:
    """After each turn the conversation goes on with the same probability."""
    shape = [_turn(chance)]
    while len(shape) < MAX_TURNS and chance.random() < 1 - 1 / MEAN_TURNS:
        shape.append(_turn(chance))
    return tuple(shape)


def _turn(chance: random.Random) -> TurnShape:
    return TurnShape(_length(chance, *NEW_TOKENS), _length(chance, *OUTPUT_TOKENS))


def _length(chance: random.Random, median: float, sigma: float, maximum: int) -> int:
    return min(max(1, round(median * chance.lognormvariate(0.0, sigma))), maximum)
