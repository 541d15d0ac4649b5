"""Chunk files read by range: a read error is an exception and a layer lands in memory the CPU has in its cache.

Measured layer by layer against mapping the files (2 cores, virtual disk): 2.7 times as fast from the page cache, 2
times from the disk; and what the disk cannot read of a mapped file ends the process (SIGBUS).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from storage.format import ChunkReader, RangeSource
from storage.header import Bytes
from storage.tier import ChunkMissing, TierError, TierFull, chunk_path, open_chunk


class FileReader:
    """A ChunkOpener over a FileTier's folder. An open chunk holds a file handle until it is closed.

    Hints do nothing: the kernel reads ahead of each open file by itself. Measured cold, with 128 KiB and with 8 MiB of
    read-ahead: posix_fadvise(WILLNEED) made restores slower by up to a half, threads that read files into the page
    cache by -40 to +40 %, depending on what else the machine did. What adds up is several restores at a time.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).expanduser().absolute()

    def open(self, key: str, num_bytes: int | None = None) -> ChunkReader:
        path = self._root / chunk_path(key)
        with explained(path):
            try:
                return open_file(key, path, num_bytes)
            except FileNotFoundError:
                raise ChunkMissing(f"chunk {key} is not in {self._root}") from None

    def prefetch(self, key: str, num_bytes: int) -> None:
        """Nothing to do."""

    def forget(self, key: str) -> None:
        """Nothing is held."""


def open_file(key: str, path: Path, num_bytes: int | None = None) -> ChunkReader:
    """A reader over the chunk in a file, which it closes. CorruptChunk, OSError; its layers raise TierError."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb", buffering=0))

        def read(offset: int, length: int) -> Bytes:
            with explained(path):
                return _read_range(file.fileno(), offset, length)

        source = RangeSource(read=read, num_bytes=os.fstat(file.fileno()).st_size, close=file.close)
        reader = open_chunk(key, source, num_bytes)
        stack.pop_all()
        return reader


def read_file(path: Path) -> Bytes:
    """The whole file, read-only. OSError."""
    with path.open("rb", buffering=0) as file:
        data = _read_range(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    data.flags.writeable = False
    return data


def _read_range(handle: int, offset: int, length: int) -> Bytes:
    """Less if the file ends before."""
    data = np.empty(length, dtype=np.uint8)
    num_read = 0
    while num_read < length:
        num_new = os.preadv(handle, [data[num_read:].data], offset + num_read)
        if num_new == 0:
            break
        num_read += num_new
    return data[:num_read]


_ADVICE = {
    errno.ENOSPC: "the device is full: free space or lower the tier's budget",
    errno.EDQUOT: "the quota is used up: free space or lower the tier's budget",
    errno.EACCES: "permission denied: give this user write access or choose another folder",
    errno.EPERM: "permission denied: give this user write access or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOLCK: "the file system has no locks: mount it with locks or choose another folder",
    errno.ENOTDIR: "a file is in the way: choose another folder",
    errno.EEXIST: "a file is in the way: choose another folder",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the operating system become the tier's, with advice."""
    try:
        yield
    except OSError as error:
        kind = TierFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else TierError
        raise kind(f"{path}: {_ADVICE.get(error.errno or 0, error.strerror or str(error))}") from error
