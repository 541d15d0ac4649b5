"""The default order: the whole queue first, then what is likeliest to come back, learned while serving."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import chain, islice
from math import log2
from typing import Any

from policies.eviction.contract import ChunkFacts
from policies.eviction.look_ahead import from_the_tail
from policies.messages import ChunkKey
from policies.ordered import SortedKeys
from policies.outlook import Outlook
from policies.places import Place
from policies.returns import STEPS_PER_OCTAVE, Features, ReturnModel, Silence

MAX_PREFIXES = 200_000  # marks whose last prompt is remembered


def bucket_of(count: int) -> int:
    """1, 2, 3, 4-6, 7-14, more: how often a conversation or a shared text has come back."""
    return count if count < 4 else 4 if count < 7 else 5 if count < 15 else 6


def features_of(count: int, answer_tokens: int) -> Features:
    """How often it came back, and the length of the last answer by powers of four."""
    return (bucket_of(count), answer_tokens.bit_length() // 2)


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt that ran: the part of its marks that was known before, and the new part, each silent since its end."""

    num_known: int
    num_marks: int
    known: Silence
    new: Silence


class Experience:
    """Watches prompts come and end, and teaches a ReturnModel. Works on marks alone, stored or not."""

    def __init__(self, model: ReturnModel) -> None:
        self._model = model
        # By mark: the prompt that brought it or was the last to match just up to it, and how many did either.
        self._seen: OrderedDict[ChunkKey, tuple[_Prompt, int]] = OrderedDict()

    def note_prompt(self, keys: Sequence[ChunkKey], now: float) -> None:
        """The silence of what it begins with is over."""
        num_known = self._num_known(keys)
        if num_known:
            prompt, _ = self._seen[keys[num_known - 1]]
            num_new = prompt.num_marks - prompt.num_known
            self._model.end(prompt.known, now, num_known / max(1, prompt.num_known))
            self._model.end(prompt.new, now, (num_known - prompt.num_known) / max(1, num_new))
        self._model.advance(now)

    def note_answer(self, keys: Sequence[ChunkKey], turn: int, answer_tokens: int, now: float) -> None:
        """The turn has ended: all its marks fall silent."""
        if not keys:
            return
        num_known = self._num_known(keys)
        num_uses = self._seen[keys[num_known - 1]][1] + 1 if num_known else 0
        share = num_known / len(keys)
        prompt = _Prompt(
            num_known,
            len(keys),
            self._model.begin(now, features_of(max(turn, num_uses), answer_tokens), share),
            self._model.begin(now, features_of(max(turn, 1), answer_tokens), 1.0 - share),
        )
        if num_known:
            self._seen[keys[num_known - 1]] = (prompt, num_uses)
        for key in keys:  # before the last known one, too, there may be new places where this prompt was cut
            self._seen.setdefault(key, (prompt, 1))
        for key in reversed(keys):  # what is forgotten first is what extends it, never a prefix of what is remembered
            self._seen.move_to_end(key)
        while len(self._seen) > MAX_PREFIXES:
            self._seen.popitem(last=False)

    def _num_known(self, keys: Sequence[ChunkKey]) -> int:
        """Marks up to the last one that was seen before."""
        return next((number for number in range(len(keys), 0, -1) if keys[number - 1] in self._seen), 0)


class Returns:
    """First goes what no waiting turn needs, lowest return index first (see policies/returns.py), then what is needed,
    from the tail of the queue to its head.

    Whatever waits in the queue will be used before anything that has yet to arrive and queue behind it; so the queue is
    protected as a whole, and prediction decides about the rest. A prefix's place in the order changes with its age
    alone; chunks of equal prospects stand in one list by last use, so only the lists' heads are compared.
    """

    def __init__(self) -> None:
        self._model = ReturnModel(num_features=2)
        self._experience = Experience(self._model)
        self._silent: dict[Place, dict[int, SortedKeys[tuple[Any, ...]]]] = {}  # by step of the factor, oldest first
        self._needed: dict[Place, SortedKeys[tuple[Any, ...]]] = {}
        self._listed: dict[tuple[Place, ChunkKey], tuple[SortedKeys[tuple[Any, ...]], tuple[Any, ...]]] = {}

    # --- learning -----------------------------------------------------------------------------------------------------

    def note_prompt(self, keys: Sequence[ChunkKey], now: float) -> None:
        self._experience.note_prompt(keys, now)

    def note_answer(self, keys: Sequence[ChunkKey], turn: int, answer_tokens: int, now: float) -> None:
        self._experience.note_answer(keys, turn, answer_tokens, now)

    # --- the order ----------------------------------------------------------------------------------------------------

    def add(self, place: Place, chunk: ChunkFacts) -> None:
        if (place, chunk.key) in self._listed:
            self._take_out(place, chunk.key)
        if chunk.next_use is not None:
            order = self._needed.setdefault(place, SortedKeys())
            rank: tuple[Any, ...] = (from_the_tail(chunk.next_use), -chunk.start, chunk.key)
        else:
            factor = self._model.factor(features_of(max(chunk.turn, chunk.num_uses), chunk.answer_tokens))
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
