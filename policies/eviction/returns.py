"""The default order: the whole queue first, then what is likeliest to come back, learned while serving."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
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

NUM_FEATURES = 4
SEGMENTS = (512, 2048)  # tokens before the end of a prompt
PRIOR = 12.0  # prompts' worth of doubt about a factor: there are many
MAX_PREFIXES = 200_000  # marks whose last prompt is remembered


class Standing(IntEnum):
    """What a stretch of a prompt is to the prompts before it."""

    TALK = 0  # of a conversation that begins, or goes on from its last answer
    SHARED = 1  # known, and then the prompt goes its own way: a document, an instruction
    OWN = 2  # what such a prompt has for itself: a question


def bucket_of(count: int) -> int:
    """1, 2, 3, 4-6, 7-14, more: how often a conversation or a shared text has come back."""
    return count if count < 4 else 4 if count < 7 else 5 if count < 15 else 6


def features_of(
    count: int, answer_tokens: int, from_end: int, standing: Standing = Standing.TALK, new_tokens: int = 0
) -> Features:
    """How often it came back, the length of the last answer and of what was new in the last prompt by powers of four,
    how far it is from the prompt's end.

    All but the last are told apart by standing: the third turn of a chat is no third question about a document.
    """
    levels = bucket_of(count), answer_tokens.bit_length() // 2, new_tokens.bit_length() // 2
    return *(level * len(Standing) + standing for level in levels), segment_of(from_end)


def segment_of(from_end: int) -> int:
    """0, 1, 2: how near to the end of the last prompt. A document comes back, the question behind it does not."""
    return sum(from_end >= bound for bound in SEGMENTS)


@dataclass(slots=True, eq=False)
class _Part:
    """A stretch [start, end) of a prompt that ran, in tokens, and its silence."""

    start: int
    end: int
    silence: Silence


@dataclass(slots=True, eq=False)
class _Visit:
    """A prompt that ran, and what is known of it."""

    turn: int
    answer_tokens: int
    num_tokens: int
    known_end: int = 0  # up to here it had been seen before
    goes_on: bool = False  # from that earlier prompt and its answer
    parts: Sequence[_Part] = ()

    def features(self, end: int, num_uses: int) -> Features:
        """Of what ends there and was in so many prompts."""
        count, end = max(self.turn, num_uses), min(end, self.num_tokens)
        new_tokens = self.num_tokens - self.known_end
        return features_of(count, self.answer_tokens, self.num_tokens - end, self.standing(end), new_tokens)

    def standing(self, end: int) -> Standing:
        """Of what ends there."""
        if not self.known_end or self.goes_on:
            return Standing.TALK
        return Standing.SHARED if end <= self.known_end else Standing.OWN


class Experience:
    """Watches prompts come and end, and teaches a ReturnModel. Works on marks alone, stored or not."""

    def __init__(self, model: ReturnModel) -> None:
        self._model = model
        self._seen: OrderedDict[ChunkKey, tuple[_Visit, int]] = (
            OrderedDict()
        )  # the last prompt with it, how many had it

    def note_prompt(self, prompt: Sequence[Mark], now: float) -> None:
        """The silence of what it begins with is over."""
        for visit, start, end in self._last_visits(prompt):
            for part in visit.parts:
                overlap = min(part.end, end) - max(part.start, start)
                if overlap > 0:
                    self._model.end(part.silence, now, overlap / (part.end - part.start))
        self._model.advance(now)

    def note_answer(self, prompt: Sequence[Mark], turn: int, answer_tokens: int, now: float) -> None:
        """The turn has ended: all its marks fall silent."""
        if not prompt:
            return
        visit, num_uses = self._visit_of(prompt, max(turn, 1), answer_tokens)
        visit.parts = self._parts_of(visit, prompt, num_uses, now)
        entry = (visit, 1)
        for mark in reversed(prompt):  # forgotten first is what extends it, never a prefix of what is remembered
            old = self._seen.get(mark.key)
            num_uses = old[1] + 1 if old is not None else 1
            if num_uses != entry[1]:
                entry = (visit, num_uses)
            self._seen[mark.key] = entry
            self._seen.move_to_end(mark.key)
        while len(self._seen) > MAX_PREFIXES:
            self._seen.popitem(last=False)

    def features(self, chunk: ChunkFacts) -> Features:
        """Of a chunk by the last prompt that went through it; by the chunk's own facts if that is not known."""
        visit, num_uses = self._seen.get(chunk.key, (None, chunk.num_uses))
        if visit is None:
            visit = _Visit(chunk.turn, chunk.answer_tokens, chunk.prompt_tokens)
        return visit.features(chunk.end, num_uses)

    def _last_visits(self, prompt: Sequence[Mark]) -> Iterator[tuple[_Visit, int, int]]:
        """Who was last at [start, end), stretch by stretch, from the end of what is known to the beginning."""
        visit, end = None, 0
        for mark in reversed(prompt):
            last, _ = self._seen.get(mark.key, (None, 0))
            if last is None or last is visit:  # where no earlier prompt was cut nothing is known, but may be before it
                continue
            if visit is not None:
                yield visit, mark.end, end
            visit, end = last, mark.end
        if visit is not None:
            yield visit, 0, end

    def _visit_of(self, prompt: Sequence[Mark], turn: int, answer_tokens: int) -> tuple[_Visit, int]:
        """The visit, still without parts, and how many prompts now had what of it was known."""
        visit = _Visit(turn, answer_tokens, prompt[-1].end)
        known = next((mark for mark in reversed(prompt) if mark.key in self._seen), None)
        if known is None:
            return visit, 1
        before, num_uses = self._seen[known.key]
        visit.known_end = known.end
        visit.goes_on = visit.num_tokens >= before.num_tokens + max(1, before.answer_tokens)
        return visit, num_uses + 1

    def _parts_of(self, visit: _Visit, prompt: Sequence[Mark], num_uses: int, now: float) -> list[_Part]:
        """Each begins its silence now. Weights are equal: a question of one chunk teaches as much as its document.

        A conversation is cut by distance from its end, as its chunks will be judged; a document that was known before
        stays one stretch: it comes back whole, whatever is asked about it.
        """
        known_end, num_tokens = visit.known_end, visit.num_tokens
        first_cut = 0 if visit.standing(num_tokens) is Standing.TALK else known_end
        cuts = {max(first_cut, _end_before(prompt, num_tokens - bound)) for bound in SEGMENTS}
        stretches = list(pairwise(sorted({0, known_end, *cuts, num_tokens})))
        parts = []
        for start, end in stretches:
            features = visit.features(end, num_uses if end <= known_end else 1)
            parts.append(_Part(start, end, self._model.begin(now, features, 1.0 / len(stretches))))
        return parts


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
        self._model = ReturnModel(num_features=NUM_FEATURES, prior=PRIOR)
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
            factor = self._model.factor(self._experience.features(chunk))
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
