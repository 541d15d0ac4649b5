"""The scheduler's eviction policy at work inside an engine: the same plug-in orders chunks in HBM.

A policy that raises or answers nonsense is counted (`Shard.stats`: `hbm_policy_faults`) and does not stop a turn: the
engine then takes the candidates as they came. Policies that learn are not told of prompts here, and none is told that
a chunk was evicted: an engine does not say why one is no candidate any more.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

from policies.eviction import ChunkFacts, EvictionPolicy
from policies.messages import ChunkKey, NodeId, Tier
from policies.outlook import Outlook
from policies.places import Place
from policies.plugins import Guard, load_policy, require_verbs


class HbmEviction:
    """`actors.engine.kept.BlockEviction` over a policy named by its import path. ValueError if there is none."""

    def __init__(self, path: str, node_id: NodeId = "engine") -> None:
        policy = load_policy("eviction", path)
        require_verbs("eviction", policy, ("add", "remove", "victims"))
        self._policy = cast(EvictionPolicy, policy)
        self._place = Place(node_id, Tier.HBM)
        self._guard = Guard()
        self._now = 0.0  # the latest use it heard of

    def add(self, place: Hashable, chunk: ChunkFacts) -> None:  # noqa: ARG002 - an engine has one place
        self._now = max(self._now, chunk.last_used)
        self._guard.tell(self._policy, "add", lambda: self._policy.add(self._place, chunk))

    def remove(self, place: Hashable, key: ChunkKey) -> None:  # noqa: ARG002 - as above
        self._guard.tell(self._policy, "remove", lambda: self._policy.remove(self._place, key, evicted=False))

    def victims(self, place: Hashable, count: int) -> Sequence[ChunkKey]:  # noqa: ARG002 - as above
        outlook = Outlook.without_queue(self._now)

        def ask() -> Sequence[ChunkKey]:
            return self._policy.victims(self._place, count, outlook)

        return self._guard.consult(self._policy, "victims", ask, _problem_with, lambda: ())

    @property
    def num_faults(self) -> int:
        """Decisions that the policy did not make properly."""
        return self._guard.num_faults.total()


def _problem_with(keys: object) -> str | None:
    is_sound = isinstance(keys, Sequence) and all(isinstance(key, str) for key in keys)
    return None if is_sound else f"answered {keys!r}, not a sequence of keys"
