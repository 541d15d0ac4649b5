"""Chunks as objects of any fsspec file system (s3://, gs://, memory://, …): the OBJECT tier.

A chunk is one PUT, and one GET where its size is known; else a ranged GET of its head, and one per layer. Nothing is
cached and no listing is trusted. Several tiers may share a bucket; see `storage.filesystem` for what counts towards
which budget. The file system should make an object visible only when it is complete, as every object store does.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from storage.account import Account
from storage.arrivals import Arrival, Arrivals
from storage.format import FIRST_READ_BYTES, ChunkReader, RangeSource
from storage.header import Buffer, ChunkHeader, CorruptChunk, byte_view
from storage.remote import Bucket
from storage.tier import CHUNK_SUFFIX, ChunkMissing, TierError, TierFull, chunk_path, open_chunk

_logger = logging.getLogger(__name__)

_INVENTORY_BATCH = 64  # heads asked for at once
_CLEAN_UP_S = 2.0
_KEEP_DEADLINES = 2.0  # so many deadlines a prefetched chunk waits to be opened


class BucketReader:
    """A ChunkOpener below a URL, for processes beside the one that has the ObjectTier.

    A chunk of known size is one GET, and its layers are read from memory; whoever wants a chunk that is on its way, or
    that somebody is reading, shares it. Of unknown size it is a HEAD and ranged GETs. At most `prefetch_bytes` of
    memory hold chunks that were prefetched and not opened yet.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = 30.0,
        prefetch_bytes: int = 512 << 20,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self._bucket = Bucket(url, deadline_s, options)
        self._url = url
        self._arrivals = Arrivals(
            lambda key, num_bytes: self._bucket.begin_get(key, 0, num_bytes),
            limit_bytes=prefetch_bytes,
            keep_s=_KEEP_DEADLINES * deadline_s,
        )

    def open(self, key: str, num_bytes: int | None = None) -> ChunkReader:
        try:
            arrival = self._arrivals.take(key, num_bytes)
        except FileNotFoundError:
            raise ChunkMissing(f"chunk {key} is not in {self._url}") from None
        source = self._by_range(key) if arrival is None else _from_memory(arrival)
        return open_chunk(key, source, num_bytes)

    def prefetch(self, key: str, num_bytes: int) -> None:
        self._arrivals.expect(key, num_bytes)

    def forget(self, key: str) -> None:
        self._arrivals.forget(key)

    def _by_range(self, key: str) -> RangeSource:
        size = self._bucket.size(key)
        if size is None:
            raise ChunkMissing(f"chunk {key} is not in {self._url}")
        return RangeSource(read=lambda start, length: self._get(key, start, length), num_bytes=size)

    def _get(self, key: str, start: int, length: int) -> bytes:
        try:
            return self._bucket.get(key, start, start + length)
        except FileNotFoundError:
            raise ChunkMissing(f"chunk {key} is no longer in {self._url}") from None


def _from_memory(arrival: Arrival) -> RangeSource:
    """Its reader keeps the arrival, and with it the bytes."""
    return RangeSource(read=lambda offset, length: arrival.data[offset : offset + length], num_bytes=len(arrival.data))


class _Changed(Exception):  # noqa: N818 - not an error
    """What was found under a key is not there any more."""


class ObjectTier:
    """A ChunkTier below a URL. Every request ends within `deadline_s`, after which it is a TierError.

    At the start the listing is read, and what fits the budget is counted; what does not stays where it is, uncounted
    but readable. TierError if the place does not answer or does not exist.
    """

    def __init__(
        self, url: str, budget_bytes: int, *, deadline_s: float = 30.0, options: Mapping[str, object] | None = None
    ) -> None:
        self.budget_bytes = budget_bytes
        self._account = Account(budget_bytes)
        self._bucket = Bucket(url, deadline_s, options)
        self._url = url
        self._adopt()

    @property
    def deadline_s(self) -> float:
        return self._bucket.deadline_s

    @property
    def used_bytes(self) -> int:
        return self._account.used_bytes

    def put(self, key: str, data: Buffer) -> int:
        view, path = byte_view(data), self._bucket.path(key)
        size = self._bucket.size(key)
        num_bytes = len(view) if size is None else size
        try:
            with self._account.adding(key, num_bytes, lambda: self._is_there(key)) as is_new:
                if is_new and size is None:
                    self._upload(path, view.tobytes())
                elif is_new and self._bucket.size(key) != size:
                    raise _Changed
        except _Changed:  # somebody deleted it before it was ours to count
            return self.put(key, data)
        return self._account.get(key) or num_bytes

    def open(self, key: str) -> ChunkReader:
        source = RangeSource(
            read=lambda offset, length: self._get(key, offset, offset + length), num_bytes=self.num_bytes(key)
        )
        return open_chunk(key, source)

    def read(self, key: str) -> bytes:
        return self._get(key, 0, self._account.get(key))

    def delete(self, key: str) -> bool:
        path = self._bucket.path(key)
        with self._account.removing(key) as is_known:
            if not is_known and self._bucket.size(key) is None:
                return False
            try:
                self._bucket.call("rm_file", path)
            except FileNotFoundError:
                return False
            return True

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and self.num_bytes(key) > 0
        except ChunkMissing:
            return False

    def num_bytes(self, key: str) -> int:
        size = self._account.get(key)
        if size is None:
            size = self._bucket.size(key)
        if size is None:
            raise ChunkMissing(f"chunk {key} is not in {self._url}")
        return size

    def keys(self) -> list[str]:
        return self._account.keys()

    def inventory(self) -> Iterator[tuple[ChunkHeader, int]]:
        keys = iter(self.keys())
        while batch := [
            (key, size) for key in itertools.islice(keys, _INVENTORY_BATCH) if (size := self._account.get(key))
        ]:
            paths, ends = (
                [self._bucket.path(key) for key, _ in batch],
                [min(size, FIRST_READ_BYTES) for _, size in batch],
            )
            heads = self._bucket.call("cat_ranges", paths, [0] * len(batch), ends, on_error="return")
            for (key, size), head in zip(batch, heads):
                header = self._header_or_none(key, size, head)
                if header is not None:
                    yield header, size

    def close(self) -> None:
        """Nothing is held."""

    def _adopt(self) -> None:
        try:
            found: dict[str, dict[str, Any]] = self._bucket.call("find", self._bucket.root, detail=True)
        except FileNotFoundError:
            found = {}
        num_left = 0
        for path, info in found.items():
            name = path.rsplit("/", 1)[-1]
            key = name.removesuffix(CHUNK_SUFFIX)
            if name != key and path.endswith("/" + chunk_path(key)):
                try:
                    with self._account.adding(key, int(info["size"])):
                        pass  # it is there
                except TierFull:
                    num_left += 1
        if num_left:
            _logger.warning(
                "%s holds %d chunks beyond this tier's budget: raise it or delete them", self._url, num_left
            )

    def _is_there(self, key: str) -> bool:
        return self._bucket.size(key) is not None

    def _forget_if_gone(self, key: str) -> None:
        self._account.forget_unless(key, lambda: self._is_there(key))

    def _get(self, key: str, start: int, end: int | None) -> bytes:
        try:
            return self._bucket.get(key, start, end)
        except FileNotFoundError:
            self._forget_if_gone(key)
            raise ChunkMissing(f"chunk {key} is no longer in {self._url}") from None

    def _upload(self, path: str, data: bytes) -> None:
        try:
            self._bucket.call("pipe_file", path, data)
        except FileNotFoundError as error:
            raise TierError(f"{self._url} does not exist: create the bucket or folder first") from error
        except TierError:
            with suppress(TierError, FileNotFoundError):
                self._bucket.call("rm_file", path, deadline_s=min(self._bucket.deadline_s, _CLEAN_UP_S))
            raise

    def _header_or_none(self, key: str, size: int, head: bytes | Exception) -> ChunkHeader | None:
        """The header of one chunk of the inventory; a damaged one is deleted."""
        if isinstance(head, FileNotFoundError):
            self._forget_if_gone(key)
            return None
        if isinstance(head, Exception):
            _logger.warning("skipping unreadable chunk %s: %s", key, head)
            return None
        source = RangeSource(
            read=lambda start, length: head if start == 0 else self._get(key, start, start + length), num_bytes=size
        )
        try:
            return open_chunk(key, source).header
        except CorruptChunk as error:
            _logger.warning("deleting damaged chunk %s: %s", key, error)
            self.delete(key)
        except TierError as error:
            _logger.warning("skipping unreadable chunk %s: %s", key, error)
        return None
