"""What is worth saving at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from policies.messages import ChunkInfo, SessionId
from policies.outlook import Outlook


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
