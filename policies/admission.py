"""What is worth saving at all."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from policies.messages import ChunkInfo, ChunkKey, SessionId
from policies.outlook import Outlook
from policies.returns import ReturnModel, Silence


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A chunk that is nowhere stored yet, offered by a replica."""

    session_id: SessionId
    chunk: ChunkInfo
    is_awaited: bool  # a waiting turn's prompt contains all of it
    dram_fill: float  # share of the node's DRAM budget in use


class AdmissionPolicy(Protocol):
    """Decides offer by offer. Chunks whose parent was declined are never asked about: they could not be reached."""

    def admit(self, offer: Offer, outlook: Outlook) -> bool:
        """Whether to save the chunk. May keep its own memory of past offers."""


class Always:
    """Everything is saved; eviction sorts it out (what the paper does)."""

    def admit(self, offer: Offer, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return True


class SecondTouch:
    """A chunk is saved when its key was offered before, or a waiting turn needs it: one-time prompts never get in.

    Its parent must be in first, so a prefix of n new chunks takes n + 1 visits to be saved to its end.
    """

    def __init__(self, max_keys: int = 100_000) -> None:
        """`max_keys`: how many declined keys are remembered; the oldest are forgotten."""
        if max_keys < 1:
            raise ValueError("SecondTouch takes max_keys of 1 or more")
        self._max_keys = max_keys
        self._declined: OrderedDict[ChunkKey, None] = OrderedDict()

    def admit(self, offer: Offer, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        key = offer.chunk.key
        if offer.is_awaited or key in self._declined:
            self._declined.pop(key, None)
            return True
        self._declined[key] = None
        if len(self._declined) > self._max_keys:
            self._declined.popitem(last=False)
        return False


@dataclass(slots=True, eq=False)
class _Session:
    """A session whose chunks were offered: how many turns that took, and its silence since the last."""

    num_turns: int
    last_offer: float
    silence: Silence


class ReturnProbability:
    """A chunk is saved when its session is likely enough to come back, or a waiting turn needs it.

    The chance that a session's next turn comes within `within_s` is learned by the number of its turns so far (see
    policies/returns.py). Only offers are seen here: those less than `pause_s` apart belong to one turn. Until
    `min_turns` turns have been seen everything is saved.
    """

    def __init__(
        self,
        threshold: float = 0.2,
        within_s: float = 3600.0,
        pause_s: float = 2.0,
        min_turns: int = 500,
        max_sessions: int = 100_000,
    ) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError("ReturnProbability takes a threshold between 0 (save all) and 1")
        self._threshold, self._within_s, self._pause_s = threshold, within_s, pause_s
        self._min_turns, self._max_sessions = min_turns, max_sessions
        self._model = ReturnModel(num_features=1)
        self._num_seen = 0
        self._sessions: OrderedDict[SessionId, _Session] = OrderedDict()

    def admit(self, offer: Offer, outlook: Outlook) -> bool:
        num_turns = self._note(offer.session_id, outlook.now)
        if offer.is_awaited or self._num_seen < self._min_turns:
            return True
        return self._model.probability((_turn_level(num_turns),), 0.0, self._within_s) >= self._threshold

    def _note(self, session_id: SessionId, now: float) -> int:
        """Which turn of the session this is."""
        session = self._sessions.get(session_id)
        if session is not None and now - session.last_offer < self._pause_s:
            session.last_offer = now
            return session.num_turns
        num_turns = 1
        if session is not None:
            self._model.end(session.silence, now)
            num_turns = session.num_turns + 1
        self._model.advance(now)
        self._num_seen += 1
        self._sessions[session_id] = _Session(num_turns, now, self._model.begin(now, (_turn_level(num_turns),)))
        self._sessions.move_to_end(session_id)
        if len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)
        return num_turns


def _turn_level(num_turns: int) -> int:
    """1, 2, 3, 4-7, 8 and more."""
    return num_turns if num_turns < 4 else 4 if num_turns < 8 else 5
