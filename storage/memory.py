"""The dull tier: chunks in this process's memory. The reference that the others are compared with."""

from __future__ import annotations

from collections.abc import Iterator

from storage.account import Account
from storage.format import ChunkReader
from storage.header import Buffer, Bytes, ChunkHeader, CorruptChunk, byte_view
from storage.tier import ChunkMissing, TierFull, open_chunk


class MemoryTier:
    """A ChunkTier in a dict. Copies what it is given, lends what it has; gone with the process."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._account = Account(budget_bytes)
        self._chunks: dict[str, Bytes] = {}

    @property
    def used_bytes(self) -> int:
        return self._account.used_bytes

    def put(self, key: str, data: Buffer) -> int:
        view = byte_view(data)
        with self._account.adding(key, len(view)) as is_new:
            if is_new:
                self._chunks[key] = _copy(view)
            return len(self._chunks[key])

    def open(self, key: str) -> ChunkReader:
        return open_chunk(key, self.read(key))

    def read(self, key: str) -> Bytes:
        try:
            return self._chunks[key]
        except KeyError:
            raise ChunkMissing(f"chunk {key} is not in memory") from None

    def delete(self, key: str) -> bool:
        with self._account.removing(key):
            return self._chunks.pop(key, None) is not None

    def __contains__(self, key: object) -> bool:
        return key in self._chunks

    def num_bytes(self, key: str) -> int:
        return len(self.read(key))

    def keys(self) -> list[str]:
        return self._account.keys()

    def inventory(self) -> Iterator[tuple[ChunkHeader, int]]:
        for key in self.keys():
            try:
                yield self.open(key).header, self.num_bytes(key)
            except CorruptChunk:
                self.delete(key)
            except ChunkMissing:
                continue

    def close(self) -> None:
        for key in self.keys():
            self.delete(key)


def _copy(view: Bytes) -> Bytes:
    try:
        copy = view.copy()
    except MemoryError as error:
        raise TierFull(f"this machine has no memory for {len(view)} bytes: lower the budget") from error
    copy.flags.writeable = False
    return copy
