"""Leases: pins on copies with an owner and a deadline. Nothing else keeps an idle copy from being dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policies.catalog import Chunk, Copy


@dataclass(slots=True)
class Lease:
    deadline: float
    held: dict[Copy, Chunk] = field(default_factory=dict)


class Leases:
    """One lease per owner: a turn, over all copies its plan reads, or a pin. `changed` hears of chunks whose
    pins changed."""

    def __init__(self, changed: Callable[[Chunk], None]) -> None:
        self.by_owner: dict[str, Lease] = {}
        self._changed = changed

    def __len__(self) -> int:
        return len(self.by_owner)

    def grant(self, owner: str, held: Iterable[tuple[Chunk, Copy]], deadline: float) -> None:
        """Pin these copies for the owner, in place of what it held before. Nothing to hold makes no lease."""
        self.release(owner)
        self.extend(owner, held, deadline)

    def extend(self, owner: str, held: Iterable[tuple[Chunk, Copy]], deadline: float) -> None:
        """Pin these copies as well. Nothing to hold makes no lease."""
        lease = self.by_owner.get(owner) or Lease(deadline)
        for chunk, copy in held:
            lease.held[copy] = chunk
            copy.holders |= {owner}
            self._changed(chunk)
        if lease.held:
            self.by_owner[owner] = lease

    def release(self, owner: str, count: int | None = None) -> bool:
        """Unpin what the owner holds, or `count` copies of it; whether nothing is left. No lease is fine."""
        lease = self.by_owner.get(owner)
        if lease is None:
            return True
        for copy, chunk in list(islice(lease.held.items(), count)):
            self.let_go(owner, copy)
            self._changed(chunk)
        return not lease.held

    def detach(self, copy: Copy) -> None:
        """The copy is going although it is pinned (lost or corrupt): its holders keep the rest of their leases."""
        for owner in list(copy.holders):
            self.let_go(owner, copy)

    def let_go(self, owner: str, copy: Copy) -> None:
        """The owner keeps the rest of its lease. Its caller tells of the change."""
        lease = self.by_owner[owner]
        del lease.held[copy]
        copy.holders -= {owner}
        if not lease.held:
            del self.by_owner[owner]

    def shift(self, owner: str, chunk: Chunk, copy: Copy, to: Copy) -> None:
        """The owner holds another copy of the chunk in place of this one."""
        lease = self.by_owner[owner]
        del lease.held[copy]
        lease.held[to] = chunk
        copy.holders -= {owner}
        to.holders |= {owner}
        self._changed(chunk)
