"""Planning a restore: which chunks of a prompt come from where, and why each other token is computed. Changes nothing.

    prompt marks    m1        m2      b1        m3    end
    chunks       [------)[--------)[--X---------)           X: a chunk of another conversation with the same b1
    links           1         2      3 (up to b1)           then the engine computes

The leading run is made of full chunks by their last mark, then of the first part of one more chunk up to the longest
mark it shares with the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from policies.catalog import Catalog, Chunk, Copy, CopyState
from policies.messages import Cause, Mark, RestorePlan, RestoreStep, Turn
from policies.places import STORE_TIERS, Place


@dataclass(frozen=True, slots=True)
class Link:
    """The tokens [chunk.start, end) of a prompt are the beginning of this chunk."""

    chunk: Chunk
    end: int


Usable = Callable[[Chunk], int | None]
"""How good a chunk's best usable copy is (lower is better); None when it has none."""


def find_links(prompt: Sequence[Mark], catalog: Catalog, usable: Usable) -> list[Link]:
    """The longest leading run of the prompt made of usable chunks.

    From each position the marks ahead are tried until one belongs to a later chunk; the furthest usable one counts.
    """
    links: list[Link] = []
    position = end = 0
    best: Chunk | None = None  # its tokens [position, end) are of use
    for mark in prompt:
        carriers = catalog.carriers(mark.key)
        if not carriers:
            continue
        furthest = carriers[0].start if len(carriers) == 1 else max(chunk.start for chunk in carriers)
        if furthest > position:
            if best is None or furthest > end:
                break
            links.append(Link(best, end))
            position, best = end, None
        chunk = _best(carriers, position, usable)
        if chunk is not None:
            best, end = chunk, mark.end
    return links if best is None else [*links, Link(best, end)]


def _best(carriers: Sequence[Chunk], position: int, usable: Usable) -> Chunk | None:
    """Of the carriers that start here, the one with the best usable copy, the first among equals."""
    if len(carriers) == 1:  # nearly always
        only = carriers[0]
        return only if only.start == position and usable(only) is not None else None
    best: tuple[int, Chunk] | None = None
    for chunk in carriers:
        if chunk.start == position and (quality := usable(chunk)) is not None and (best is None or quality < best[0]):
            best = (quality, chunk)
    return best[1] if best else None


def live(chunk: Chunk) -> int | None:
    """Usable: has a copy, or is about to have one; better if no longer chunk is about to take its place."""
    return int(chunk.superseded) if chunk.is_live else None


def find_copy(chunk: Chunk, places: Sequence[Place]) -> Copy | None:
    """The copy in the first of these places that has a readable one."""
    for place in places:
        copy = chunk.resident(place)
        if copy is not None:
            return copy
    return None


def readable_at(places: Sequence[Place]) -> Usable:
    """Usable: readable from a node whose tiers are these places, fastest first."""

    def quality(chunk: Chunk) -> int | None:
        copy = find_copy(chunk, places)
        return None if copy is None else STORE_TIERS.index(copy.place.tier)

    return quality


@dataclass(frozen=True, slots=True)
class Restore:
    """A plan, and the copies its steps read (to be leased), step by step."""

    plan: RestorePlan
    reads: tuple[tuple[Chunk, Copy], ...]


def plan_restore(turn: Turn, catalog: Catalog, places: Sequence[Place], known_end: int | None) -> Restore:
    """What the turn restores on a node whose tiers are `places` (fastest first), as things stand.

    `known_end`: up to which token the session was offered for saving before; None when it is not remembered. At least
    one token is always computed.
    """
    num_tokens = turn.num_prompt_tokens
    if not turn.reuse:
        return Restore(RestorePlan(recomputed=((Cause.REUSE_OFF, num_tokens),)), ())
    links = find_links(turn.prompt, catalog, readable_at(places))
    steps, reads = [], []
    for link in links:
        copy = find_copy(link.chunk, places)
        num_used = min(link.end, num_tokens - 1) - link.chunk.start
        if copy is None or num_used <= 0:
            break
        steps.append(
            RestoreStep(
                chunk=link.chunk.key,
                start=link.chunk.start,
                num_tokens=num_used,
                num_bytes=copy.num_bytes,
                tier=copy.place.tier,
                node_id=copy.place.node_id,
            )
        )
        reads.append((link.chunk, copy))
    num_matched = links[-1].end if links else 0
    causes = _Causes(turn, catalog, places, known_end).charge(min(num_matched, num_tokens))
    return Restore(RestorePlan(steps=tuple(steps), recomputed=causes), tuple(reads))


class _Causes:
    """Charges every token that is not reused to a cause.

    Keys chain: if a prefix was ever stored, so were all shorter ones. So tokens up to the last mark that the catalog
    or the ghosts remember were lost on the way and have a cause; what lies beyond was never stored. A stretch without
    a memory of its own takes the cause of the next one that has; one that is readable but behind a gap takes the gap's.
    """

    def __init__(self, turn: Turn, catalog: Catalog, places: Sequence[Place], known_end: int | None) -> None:
        self._turn, self._catalog = turn, catalog
        self._usable = readable_at(places)
        self._known_end = turn.num_prompt_tokens if known_end is None else known_end
        self._tokens: dict[Cause, int] = {}

    def charge(self, num_matched: int) -> tuple[tuple[Cause, int], ...]:
        """The causes of all tokens from `num_matched` on (or of the last one), with their numbers of tokens."""
        num_tokens = self._turn.num_prompt_tokens
        if num_matched >= num_tokens:
            return ((Cause.LAST_TOKEN, 1),)
        position = num_matched
        for end, cause in self._name_stretches(num_matched):
            self._add(cause, min(end, num_tokens) - position)
            position = min(end, num_tokens)
        self._add_unknown(position, num_tokens)
        return tuple(self._tokens.items())

    def _name_stretches(self, num_matched: int) -> list[tuple[int, Cause]]:
        """(end, cause) of the stretches between marks, up to the last mark that is remembered."""
        marks = [mark for mark in self._turn.prompt if mark.end > num_matched]
        memories = [self._memory(mark) for mark in marks]
        last = max((number for number, memory in enumerate(memories) if memory is not None), default=-1)
        stretches: list[tuple[int, Cause]] = []
        gap: Cause | None = None
        for number in range(last + 1):
            memory = next(memory for memory in memories[number : last + 1] if memory is not None)
            cause = (gap or Cause.EVICTED) if memory is _READABLE else Cause(memory)
            gap = gap or cause
            stretches.append((marks[number].end, cause))
        return stretches

    def _memory(self, mark: Mark) -> str | None:
        """Why this prefix is not at hand; `_READABLE` when it is; None when nothing is known of it."""
        chunk = self._catalog.covering(mark.key)
        if chunk is not None:
            readable = any(self._usable(carrier) is not None for carrier in self._catalog.carriers(mark.key))
            return _READABLE if readable else Cause.LATE
        for chunk in self._catalog.carriers(mark.key):
            for copy in chunk.copies.values():
                assert copy.state is CopyState.DROPPING
                return copy.cause
        return self._catalog.ghosts.get(mark.key)

    def _add_unknown(self, start: int, end: int) -> None:
        """Tokens of which nothing is remembered: new text, unless the template drifted away from what was stored."""
        drift_at = self._turn.drift_at
        if drift_at is not None:
            drift_start, drift_end = max(start, drift_at), max(start, min(end, self._known_end))
            num_drifted = max(0, drift_end - drift_start)
            self._add(Cause.DRIFT, num_drifted)
            self._add(Cause.NEVER_STORED, end - start - num_drifted)
        else:
            self._add(Cause.NEVER_STORED, end - start)

    def _add(self, cause: Cause, num_tokens: int) -> None:
        if num_tokens > 0:
            self._tokens[cause] = self._tokens.get(cause, 0) + num_tokens


_READABLE = "readable"
