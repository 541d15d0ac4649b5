"""Feeds events to a scheduler, checks it after each one, and plays the actors that do at once as they are told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from policies import messages as m
from policies.messages import Tier
from policies.scheduler import Scheduler
from tests.policies.texts import Tokens, bytes_of, chunks_of, turn_of

CommandT = TypeVar("CommandT")

GIB = 1 << 30


class Driver:
    """One scheduler under test. `log` holds all commands so far."""

    def __init__(self, config: m.SchedulerConfig | None = None, **policies: Any) -> None:
        self.scheduler = Scheduler(config, **policies)
        self.now = 0.0
        self.log: list[m.Command] = []

    # --- events -------------------------------------------------------------------------------------------------------

    def feed(self, *events: m.Event, after_s: float = 0.0) -> list[m.Command]:
        """The commands that answer these events; the clock goes forward first."""
        self.now += after_s
        commands: list[m.Command] = []
        for event in events:
            commands += self.scheduler.handle(event, self.now)
            self.scheduler.check()
        self.log += commands
        return commands

    def wait(self, seconds: float) -> list[m.Command]:
        return self.feed(m.Tick(), after_s=seconds)

    def join(
        self,
        node_id: str = "n1",
        *,
        dram: int = GIB,
        ssd: int = 0,
        bucket: int = 0,
        inventory: Iterable[tuple[m.ChunkInfo, Tier]] = (),
    ) -> list[m.Command]:
        sizes = {Tier.DRAM: dram, Tier.SSD: ssd, Tier.OBJECT: bucket}
        tiers = tuple(m.TierSpec(tier=tier, budget_bytes=size) for tier, size in sizes.items() if size)
        stored = tuple(m.StoredChunk(info=info, tier=tier) for info, tier in inventory)
        return self.feed(m.NodeJoined(node_id=node_id, tiers=tiers, inventory=stored))

    def replica(
        self, replica_id: str = "r1", node_id: str = "n1", *, slots: int = 4, tokens: int = 1000
    ) -> list[m.Command]:
        return self.feed(
            m.ReplicaReady(replica_id=replica_id, node_id=node_id, max_running_turns=slots, max_running_tokens=tokens)
        )

    def submit(self, turn_id: str, tokens: Tokens, **rest: Any) -> list[m.Command]:
        return self.feed(m.TurnSubmitted(turn_of(turn_id, tokens, **rest)))

    def start(self, turn_id: str, replica_id: str = "r1") -> list[m.Command]:
        return self.feed(m.TurnStarted(turn_id=turn_id, replica_id=replica_id))

    def finish(self, turn_id: str, replica_id: str = "r1") -> list[m.Command]:
        return self.feed(m.TurnFinished(turn_id=turn_id, replica_id=replica_id))

    def offer(
        self, chunks: Sequence[m.ChunkInfo], session: str = "s", replica_id: str = "r1", node_id: str = "n1"
    ) -> list[m.Command]:
        return self.feed(
            m.ChunksReady(replica_id=replica_id, node_id=node_id, session_id=session, chunks=tuple(chunks))
        )

    # --- obedient actors ----------------------------------------------------------------------------------------------

    def obey(self, commands: Iterable[m.Command]) -> list[m.Command]:
        """Confirm these commands of node stores, and all that follow; everything that was commanded on the way."""
        heard: list[m.Command] = []
        queue = list(commands)
        while queue:
            command = queue.pop(0)
            heard.append(command)
            event = answer(command)
            if event is not None:
                queue += self.feed(event)
        return heard

    def store(self, tokens: Tokens, *, session: str = "s", node_id: str = "n1", replica_id: str = "r1") -> None:
        """All chunks of a text are saved on the node, and what follows from it is done."""
        self.obey(self.offer(chunks_of(tokens), session, replica_id, node_id))

    # --- looking in ---------------------------------------------------------------------------------------------------

    @property
    def figures(self) -> dict[str, Any]:
        return self.scheduler.snapshot()

    def stored(self, tier: Tier = Tier.DRAM, node_id: str = "n1") -> set[str]:
        """Keys with a readable copy there."""
        return {
            key
            for key, chunk in self.scheduler.board.catalog.chunks.items()
            for place, copy in chunk.copies.items()
            if place == (node_id, tier) and copy.state == "resident"
        }

    def stale(self) -> int:
        """How many events changed nothing."""
        return sum(count for name, count in self.figures["counters"].items() if name.startswith("stale."))


def answer(command: m.Command) -> m.Event | None:
    """The event by which an actor confirms a command; None where there is nothing to confirm."""
    match command:
        case m.Save():
            return m.ChunksSaved(node_id=command.node_id, chunks=tuple(info.key for info in command.chunks))
        case m.Fetch():
            return m.ChunkFetched(node_id=command.node_id, chunk=command.chunk)
        case m.Demote():
            return m.ChunkDemoted(
                node_id=command.node_id,
                chunk=command.chunk,
                tier=command.tier,
                num_bytes=bytes_of(command.chunk),
            )
        case m.Drop():
            return m.ChunkDropped(node_id=command.node_id, chunk=command.chunk, tier=command.tier)
        case m.Cancel():
            return m.TurnFinished(turn_id=command.turn_id, replica_id=command.replica_id, attempt=command.attempt)
    return None


def only(commands: Iterable[m.Command], kind: type[CommandT]) -> list[CommandT]:
    """The commands of one kind."""
    return [command for command in commands if isinstance(command, kind)]


def dispatched(commands: Iterable[m.Command]) -> list[m.TurnId]:
    return [command.turn_id for command in only(commands, m.Dispatch)]


def the(commands: Iterable[m.Command], kind: type[CommandT]) -> CommandT:
    """The one command of this kind."""
    (command,) = only(commands, kind)
    return command
