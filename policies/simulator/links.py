"""A way that bytes take: one transfer after the other, in the order asked for, each at the full speed of the link.

    asked   a b      c
    link    [--a--][--b--]  [--c--]
    done          a+L   b+L      c+L        L: the latency, in which others may use the link

Two transfers asked for together end after T and 2T instead of both after 2T, which sharing would give: the sum is the
same, and so is the speed of a busy link. Knows no clock and no chunks.
"""

from __future__ import annotations


class Link:
    """`bytes_per_s` for all, first come, first served; `latency_s` until the first byte, which does not add up."""

    __slots__ = ("bytes_per_s", "free_at", "latency_s", "num_bytes")

    def __init__(self, bytes_per_s: float, latency_s: float = 0.0) -> None:
        self.bytes_per_s, self.latency_s = bytes_per_s, latency_s
        self.free_at = 0.0
        self.num_bytes = 0

    def send(self, now: float, num_bytes: int) -> float:
        """Take so many bytes; returns when the last one is there."""
        began = self.free_at if self.free_at > now else now
        self.free_at = began + num_bytes / self.bytes_per_s
        self.num_bytes += num_bytes
        return self.free_at + self.latency_s

    def would_end(self, now: float, num_bytes: int) -> float:
        """When the last byte of such a transfer would be there. Changes nothing."""
        return max(now, self.free_at) + num_bytes / self.bytes_per_s + self.latency_s
