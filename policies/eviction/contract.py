"""Which chunk goes first: what a policy is told, and what it is asked.

The scheduler says which copies are candidates; a policy only puts them in order. The scheduler sees to what holds for
every policy: leased and busy copies are never candidates, leaves of the prefix tree become candidates before their
parents, chunks beyond a session's time to live go before anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from policies.messages import ChunkKey, Mark
from policies.outlook import Outlook
from policies.places import Place
from policies.queue import Order


class ChunkFacts(Protocol):
    """What is known of a candidate. Read it, do not keep it: it changes under your hands."""

    @property
    def key(self) -> ChunkKey: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def stored_at(self) -> float: ...  # seconds, when the chunk became known
    @property
    def last_used(self) -> float: ...  # seconds: saved, raised or read
    @property
    def next_use(self) -> Order | None: ...  # of the first waiting turn that needs it
    @property
    def num_uses(self) -> int: ...  # turns that stored or read it
    @property
    def turn(self) -> int: ...  # of the conversation that used it last: which turn that is at; 0 is unknown
    @property
    def prompt_tokens(self) -> int: ...  # of that conversation's last prompt; 0 is unknown
    @property
    def answer_tokens(self) -> int: ...  # of that conversation's last answer; 0 is unknown


class EvictionPolicy(Protocol):
    """An order over the candidates of each place, kept up to date by `add` and `remove`.

    Aim at O(log n) for each verb. No clock, no randomness, no I/O: the same calls give the same answers.
    """

    def add(self, place: Place, chunk: ChunkFacts) -> None:
        """The copy in `place` may be evicted from now on; again for the same copy: its facts changed."""

    def remove(self, place: Place, key: ChunkKey, *, evicted: bool) -> None:
        """The copy is no candidate any more: it was evicted, or else leased, busy, lost. It was added before."""

    def victims(self, place: Place, count: int, outlook: Outlook) -> Sequence[ChunkKey]:
        """The `count` candidates that go first, in order; all of them when there are fewer.

        Asking again without anything in between gives the same answer.
        """

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:
        """Whether a victim's last copy may be given up when no lower tier takes it. Changes nothing.

        `position` counts the waiting turns before the first one that needs the chunk; None: none needs it.
        """


class Learner(Protocol):
    """What a policy that learns has besides; the scheduler tells it if the verbs are there."""

    def note_prompt(self, prompt: Sequence[Mark], now: float) -> None:
        """A turn came with this prompt (its marks, ascending). Told before anything is read or stored for it."""

    def note_answer(self, prompt: Sequence[Mark], turn: int, answer_tokens: int, now: float) -> None:
        """That turn has ended: the conversation's turn of that number (0: unknown), with an answer of this length."""


def learner_of(policy: object) -> Learner | None:
    """The policy as a learner, if it has the verbs of one."""
    is_learner = all(callable(getattr(policy, verb, None)) for verb in ("note_prompt", "note_answer"))
    return cast(Learner, policy) if is_learner else None
