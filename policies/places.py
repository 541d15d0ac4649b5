"""Places that hold chunks, and the byte account of each. Knows nothing of chunks.

A place is one tier of one node. OBJECT is different: every node that has the tier reads the same bucket, so all of it
is one place under the node-independent id `SHARED`, with one budget (that of the node which joined last). It outlives
every node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from policies.messages import NodeId, Tier, TierSpec

SHARED: NodeId = "shared"
STORE_TIERS = (Tier.DRAM, Tier.SSD, Tier.OBJECT)  # fastest first; HBM belongs to the engine


class Place(NamedTuple):
    node_id: NodeId
    tier: Tier


def place_of(node_id: NodeId, tier: Tier) -> Place:
    """Where a copy in `tier`, named by `node_id`, is accounted for."""
    return Place(SHARED, Tier.OBJECT) if tier is Tier.OBJECT else Place(node_id, tier)


@dataclass(slots=True)
class Account:
    """The bytes of one place: `used` by copies that are there, `reserved` for copies that are coming.

    `reserve` is the only way in, and refuses what does not fit: the budget cannot be exceeded. The one exception is a
    place that is found overfull when its node joins (a smaller budget after a restart): `ceiling_bytes` is then what
    was found, and comes down as the surplus is dropped.
    """

    budget_bytes: int
    bytes_per_s: float
    used_bytes: int = 0
    reserved_bytes: int = 0
    leaving_bytes: int = 0  # part of used: being dropped, or to be dropped when its copy below is written
    num_fetching: int = 0
    evicting: bool = False  # between crossing the high watermark and reaching the low one
    ceiling_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.ceiling_bytes = self.budget_bytes

    @property
    def filled_bytes(self) -> int:
        return self.used_bytes + self.reserved_bytes

    def revise(self, spec: TierSpec) -> None:
        """Take over a new budget and bandwidth; what is there stays."""
        self.budget_bytes, self.bytes_per_s = spec.budget_bytes, spec.bytes_per_s
        self.ceiling_bytes = max(self.budget_bytes, self.filled_bytes)

    def reserve(self, num_bytes: int) -> bool:
        """Set bytes aside for a copy that is coming; False, and nothing changes, when they do not fit."""
        if self.filled_bytes + num_bytes > self.budget_bytes:
            return False
        self.reserved_bytes += num_bytes
        return True

    def settle(self, reserved_bytes: int, num_bytes: int) -> None:
        """The copy came and takes `num_bytes` (the reserved ones, unless the tier measured otherwise)."""
        self.reserved_bytes -= reserved_bytes
        self.used_bytes += num_bytes
        self.ceiling_bytes = max(self.ceiling_bytes, self.filled_bytes)

    def cancel(self, num_bytes: int) -> None:
        """The copy will not come."""
        self.reserved_bytes -= num_bytes
        self._lower_ceiling()

    def inherit(self, num_bytes: int) -> None:
        """Count a copy that was found there, whether it fits or not."""
        self.used_bytes += num_bytes
        self.ceiling_bytes = max(self.ceiling_bytes, self.filled_bytes)

    def free(self, num_bytes: int) -> None:
        """The copy is gone."""
        self.used_bytes -= num_bytes
        self._lower_ceiling()

    def _lower_ceiling(self) -> None:
        self.ceiling_bytes = max(self.budget_bytes, min(self.ceiling_bytes, self.filled_bytes))
