"""The default order: the whole queue first, then what is likeliest to come back, learned while serving."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import chain, islice, pairwise
from math import log2
from typing import Any

from policies.eviction.contract import ChunkFacts
from policies.eviction.look_ahead import from_the_tail
from policies.messages import ChunkKey, Mark
from policies.ordered import SortedKeys
from policies.outlook import Outlook
from policies.places import Place
from policies.returns import STEPS_PER_OCTAVE, Features, ReturnModel, Silence

SEGMENTS = (512, 2048)  # tokens before the end of a prompt
MAX_PREFIXES = 200_000  # marks whose last prompt is remembered


def bucket_of(count: int) -> int:
    """1, 2, 3, 4-6, 7-14, more: how often a conversation or a shared text has come back."""
    return count if count < 4 else 4 if count < 7 else 5 if count < 15 else 6


def features_of(count: int, answer_tokens: int, from_end: int) -> Features:
    """How often it came back, the length of the last answer by powers of four, how far it is from the prompt's end."""
    return (bucket_of(count), answer_tokens.bit_length() // 2, segment_of(from_end))


def segment_of(from_end: int) -> int:
    """0, 1, 2: how near to the end of the last prompt. A document comes back, the question behind it does not."""
    return sum(from_end >= bound for bound in SEGMENTS)


@dataclass(slots=True, eq=False)
class _Part:
    """A stretch [start, end) of a prompt that ran, in tokens, and its silence."""

    start: int
    end: int
    silence: Silence


class Experience:
    """Watches prompts come and end, and teaches a ReturnModel. Works on marks alone, stored or not."""

    def __init__(self, model: ReturnModel) -> None:
        self._model = model
        # By mark: the parts of the prompt that brought it or was the last to match just up to it (what was known,
        # what was new), and how many prompts did either.
        self._seen: OrderedDict[ChunkKey, tuple[list[_Part], int]] = OrderedDict()

    def note_prompt(self, prompt: Sequence[Mark], now: float) -> None:
        """The silence of what it begins with is over."""
        known = self._last_known(prompt)
        if known is not None:
            before, _ = self._seen[known.key]
            for part in before:
                share = (known.end - part.start) / max(1, part.end - part.start)
                if share > 0.0:
                    self._model.end(part.silence, now, min(1.0, share))
        self._model.advance(now)

    def note_answer(self, prompt: Sequence[Mark], turn: int, answer_tokens: int, now: float) -> None:
        """The turn has ended: all its marks fall silent."""
        if not prompt:
            return
        known = self._last_known(prompt)
        num_uses = self._seen[known.key][1] + 1 if known is not None else 0
        parts = self._parts_of(prompt, known, max(turn, num_uses), max(turn, 1), answer_tokens, now)
        if known is not None:
            self._seen[known.key] = (parts, num_uses)
        for mark in prompt:  # before the last known one, too, there may be new places where this prompt was cut
            self._seen.setdefault(mark.key, (parts, 1))
        for mark in reversed(prompt):  # forgotten first is what extends it, never a prefix of what is remembered
            self._seen.move_to_end(mark.key)
        while len(self._seen) > MAX_PREFIXES:
            self._seen.popitem(last=False)

    def _parts_of(
        self, prompt: Sequence[Mark], known: Mark | None, known_count: int, count: int, answer_tokens: int, now: float
    ) -> list[_Part]:
        """Each begins its silence now. Weights are equal: a question of one chunk teaches as much as its document."""
        num_tokens, known_end = prompt[-1].end, known.end if known is not None else 0
        cuts = [max(known_end, _end_before(prompt, num_tokens - bound)) for bound in reversed(SEGMENTS)]
        stretches = [(start, end) for start, end in pairwise((0, known_end, *cuts, num_tokens)) if end > start]
        parts = []
        for start, end in stretches:
            features = features_of(known_count if end == known_end else count, answer_tokens, num_tokens - end)
            parts.append(_Part(start, end, self._model.begin(now, features, 1.0 / len(stretches))))
        return parts

    def _last_known(self, prompt: Sequence[Mark]) -> Mark | None:
        """The longest beginning of it that was seen before."""
        return next((mark for mark in reversed(prompt) if mark.key in self._seen), None)


def _end_before(prompt: Sequence[Mark], limit: int) -> int:
    """Where the last mark up to `limit` ends."""
    number = bisect_right(prompt, limit, key=lambda mark: mark.end)
    return prompt[number - 1].end if number else 0


class Returns:
    """First goes what no waiting turn needs, lowest return index first (see policies/returns.py), then what is needed,
    from the tail of the queue to its head.

    Whatever waits in the queue will be used before anything that has yet to arrive and queue behind it; so the queue is
    protected as a whole, and prediction decides about the rest. A prefix's place in the order changes with its age
    alone; chunks of equal prospects stand in one list by last use, so only the lists' heads are compared.
    """

    def __init__(self) -> None:
        self._model = ReturnModel(num_features=3)
        self._experience = Experience(self._model)
        self._silent: dict[Place, dict[int, SortedKeys[tuple[Any, ...]]]] = {}  # by step of the factor, oldest first
        self._needed: dict[Place, SortedKeys[tuple[Any, ...]]] = {}
        self._listed: dict[tuple[Place, ChunkKey], tuple[SortedKeys[tuple[Any, ...]], tuple[Any, ...]]] = {}

    # --- learning -----------------------------------------------------------------------------------------------------

    def note_prompt(self, prompt: Sequence[Mark], now: float) -> None:
        self._experience.note_prompt(prompt, now)

    def note_answer(self, prompt: Sequence[Mark], turn: int, answer_tokens: int, now: float) -> None:
        self._experience.note_answer(prompt, turn, answer_tokens, now)

    # --- the order ----------------------------------------------------------------------------------------------------

    def add(self, place: Place, chunk: ChunkFacts) -> None:
        if (place, chunk.key) in self._listed:
            self._take_out(place, chunk.key)
        if chunk.next_use is not None:
            order = self._needed.setdefault(place, SortedKeys())
            rank: tuple[Any, ...] = (from_the_tail(chunk.next_use), -chunk.start, chunk.key)
        else:
            from_end = max(0, chunk.prompt_tokens - chunk.end)
            features = features_of(max(chunk.turn, chunk.num_uses), chunk.answer_tokens, from_end)
            factor = self._model.factor(features)
            step = round(STEPS_PER_OCTAVE * log2(factor))
            order = self._silent.setdefault(place, {}).setdefault(step, SortedKeys())
            rank = (chunk.last_used, -chunk.start, chunk.key)
        order.add(rank)
        self._listed[place, chunk.key] = (order, rank)

    def remove(self, place: Place, key: ChunkKey, *, evicted: bool) -> None:  # noqa: ARG002 - the contract
        self._take_out(place, key)

    def _take_out(self, place: Place, key: ChunkKey) -> None:
        order, rank = self._listed.pop((place, key))
        order.discard(rank)

    def victims(self, place: Place, count: int, outlook: Outlook) -> Sequence[ChunkKey]:
        by_step = self._silent.get(place, {})
        runs = [self._valued(step, order, outlook.now) for step, order in by_step.items() if order]
        silent = (rank[-1] for _, rank in merge(*runs))
        return list(islice(chain(silent, (rank[-1] for rank in self._needed.get(place, ()))), count))

    def _valued(
        self, step: int, order: SortedKeys[tuple[Any, ...]], now: float
    ) -> Iterator[tuple[float, tuple[Any, ...]]]:
        """(index, rank), never falling: who is younger is not evicted before who is older in the same list."""
        value = 0.0
        for rank in order:
            value = max(value, self._model.index(step, now - rank[0]))
            yield value, rank

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return position is None
