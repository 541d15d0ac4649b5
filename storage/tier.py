"""The contract of every place that keeps chunks, and its errors; `storage.contract` tests whoever follows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from storage.format import ChunkReader, RangeSource, read_chunk
from storage.header import Buffer, ChunkHeader, CorruptChunk


class TierError(Exception):
    """The place failed or did not answer in time; the state before the call holds. The message says what to do."""


class TierFull(TierError):  # noqa: N818 - a state of the tier
    """No room within the budget, or on the device. Nothing was kept."""


class ChunkMissing(TierError):  # noqa: N818 - a state of the chunk
    """The tier does not have this chunk (any more)."""


class ChunkOpener(Protocol):
    """Reads chunks that others keep. Thread-safe.

    Who knows what it will open says so with `prefetch`, then opens or forgets each of them once. The memory that this
    takes is bounded: beyond a limit hints are ignored, and what is neither opened nor forgotten is dropped after a
    while. A hint changes nothing but the time that `open` takes.
    """

    def open(self, key: str, num_bytes: int | None = None) -> ChunkReader:
        """A reader over one chunk; takes over what `prefetch` started. `num_bytes`: the chunk's exact size, if it is
        known, which may save a request; a chunk of another size is corrupt. ChunkMissing, CorruptChunk, TierError."""

    def prefetch(self, key: str, num_bytes: int) -> None:
        """Starts bringing the bytes near and returns at once; open() soon after finds them on their way, or there.
        Never raises for the chunk's faults: open() tells. May do nothing."""

    def forget(self, key: str) -> None:
        """The chunk will not be opened after all: drops what `prefetch` started, unless others wait for it. Nothing
        for a chunk that is not prefetched."""


class ChunkTier(Protocol):
    """A place that keeps encoded chunks by key, within a budget of bytes.

    Calls may come from several threads. Chunks are immutable and content-addressed: two under one key are
    interchangeable. A tier does not look into what it is given; a reader verifies every byte it decodes, and
    `read_chunk(data).verify()` is for whoever moves bytes unread.
    Every call may raise TierError; the errors named below are the expected ones.
    """

    budget_bytes: int

    @property
    def used_bytes(self) -> int:
        """Real bytes of the chunks kept, and of those on their way in. Never above the budget."""

    def put(self, key: str, data: Buffer) -> int:
        """Keep the chunk; returns the bytes it takes. Atomic: visible when complete and not before, and a failed put
        leaves nothing behind. A key that is there already is left as it is. TierFull; ValueError for a bad buffer."""

    def open(self, key: str) -> ChunkReader:
        """The chunk, its head verified and its layers verified when read. ChunkMissing, CorruptChunk."""

    def read(self, key: str) -> Buffer:
        """The whole encoded chunk, not verified, without a copy where the tier can. ChunkMissing.

        The buffer stays valid after delete() and close(). It may be memory shared with others: never write to it."""

    def delete(self, key: str) -> bool:
        """Forget the chunk and free its bytes; False if it was not there. A reader that
        has it open goes on, or raises ChunkMissing where layers come from afar."""

    def __contains__(self, key: object) -> bool:
        """Whether open() would find the chunk now."""

    def num_bytes(self, key: str) -> int:
        """Bytes the chunk takes. ChunkMissing."""

    def keys(self) -> list[str]:
        """Keys of the chunks in this tier's account, those longest here first."""

    def inventory(self) -> Iterator[tuple[ChunkHeader, int]]:
        """Header and bytes of every chunk in the account: what a tier has after a restart. Reads the heads only;
        chunks whose head is damaged are deleted and skipped, unreadable ones skipped."""

    def close(self) -> None:
        """Let go of handles and temporary files. What is stored stays if the tier is persistent."""


def open_chunk(key: str, source: Buffer | RangeSource, num_bytes: int | None = None) -> ChunkReader:
    """A reader over what a tier found under `key`. CorruptChunk also if it is another chunk, or not of `num_bytes`."""
    reader = read_chunk(source)
    if reader.header.key != key:
        reader.close()
        raise CorruptChunk(f"found chunk {reader.header.key} under the key {key}")
    if num_bytes is not None and reader.num_bytes != num_bytes:
        reader.close()
        raise CorruptChunk(f"chunk {key} has {reader.num_bytes} bytes, not {num_bytes}")
    return reader


CHUNK_SUFFIX = ".arrow"
_NAME = re.compile(r"[A-Za-z0-9_-]{2,200}")


def chunk_path(key: str) -> str:
    """Path of a chunk below a tier's root, fanned out by the key's first two characters. ValueError."""
    if not _NAME.fullmatch(key):
        raise ValueError(f"a chunk key is 2 to 200 letters, digits, '-' and '_', not {key!r}")
    return f"{key[:2]}/{key}{CHUNK_SUFFIX}"
