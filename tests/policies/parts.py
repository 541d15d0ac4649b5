"""The parts of a simulated cluster: choices, stores, replicas with their jobs, conversations and their clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from policies import messages as m
from tests.policies.texts import Tokens

T = TypeVar("T")


class Choices:
    """Decisions read from a byte string: 0, the tamest one, when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def is_used_up(self) -> bool:
        return self._at >= len(self._data)

    def below(self, count: int) -> int:
        if self.is_used_up or count < 2:
            return 0
        self._at += 1
        return self._data[self._at - 1] % count

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def once_in(self, count: int) -> bool:
        return self.below(count) == count - 1


@dataclass
class StoreSim:
    """A node's store: what its tiers really hold. OBJECT is the world's bucket."""

    node_id: str
    budgets: dict[m.Tier, int]
    content: dict[m.Tier, dict[str, m.ChunkInfo]]
    life: int = 0  # counts restarts: commands to an earlier life have no effect
    is_alive: bool = True

    def used(self, tier: m.Tier) -> int:
        return sum(info.num_bytes for info in self.content[tier].values())

    def put(self, tier: m.Tier, info: m.ChunkInfo) -> bool:
        """Whether there was room. The budget is the store's own, too."""
        if info.key not in self.content[tier]:
            if self.used(tier) + info.num_bytes > self.budgets[tier]:
                return False
            self.content[tier][info.key] = info
        return True


@dataclass
class Job:
    """A turn on a replica."""

    talk: Talk
    turn: m.Turn
    attempt: int
    tokens: Tokens
    dispatch: m.Dispatch
    began: float
    has_started: bool = False
    num_answered: int = 0

    @property
    def is_wanted(self) -> bool:
        """Its client still listens to this attempt."""
        return self.talk.turn is self.turn and self.talk.attempt == self.attempt


@dataclass
class ReplicaSim:
    spec: m.ReplicaReady
    jobs: dict[str, Job] = field(default_factory=dict)
    buffer: dict[str, m.ChunkInfo] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)  # by a Forget: a Save of these finds nothing
    is_closing: bool = False
    life: int = 0
    is_alive: bool = True


@dataclass
class Talk:
    """A conversation and its client. `turn` is the one it waits for, if any; `attempt` grows when it asks again."""

    name: int
    tokens: Tokens
    cuts: list[int]
    turn: m.Turn | None = None
    attempt: int = 0
    num_turns: int = 0
    num_done: int = 0
    is_deleted: bool = False


@dataclass
class Deletion:
    """What may be nowhere any more, once everything is at rest. Void when somebody else saves the like anew."""

    session_id: str
    until: float
    marks: set[str]

    def covers(self, info: m.ChunkInfo) -> bool:
        return info.parent in self.marks or any(mark.key in self.marks for mark in info.marks)


@dataclass
class Task:
    """A command on its way to its actor."""

    command: m.Command
    life: int
    attempt: int
    sent: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    config: m.SchedulerConfig
    num_nodes: int = 2
    num_replicas: int = 2
    dram_bytes: int = 300
    ssd_bytes: int = 600
    object_bytes: int = 0  # 0: no such tier
    max_running_turns: int = 2
    max_running_tokens: int = 64
    is_reliable: bool = False
