"""Chunks as files of a local or mounted folder (the SSD tier), and the door that picks a tier for a URL.

    root/ab/abcdef….arrow           a committed chunk, fanned out by the first two characters of its key
    root/.tmp/<writer>/             files being written by one living writer
    root/.tmp/<writer>.lock         locked (flock) while that writer lives; the kernel unlocks it when it dies

Several processes may share a folder. A chunk another one wrote is found; it counts towards this tier's budget once it
was put here too, or if it was there when the tier started.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import fsspec.utils

from storage.account import Account
from storage.bucket import BucketReader, ObjectTier
from storage.direct import write_new
from storage.files import FileReader, explained, open_file, read_file
from storage.format import ChunkReader
from storage.header import Buffer, Bytes, ChunkHeader, CorruptChunk, byte_view
from storage.tier import CHUNK_SUFFIX, ChunkMissing, ChunkOpener, ChunkTier, TierError, chunk_path

__all__ = ["FileReader", "FileTier", "ObjectTier", "open_reader", "open_tier"]

_logger = logging.getLogger(__name__)


def open_tier(
    url: str, budget_bytes: int, *, deadline_s: float = 30.0, options: Mapping[str, object] | None = None
) -> ChunkTier:
    """A FileTier for a path or a file:// URL, else an ObjectTier over the fsspec file system of the URL.

    `deadline_s` limits each operation of an ObjectTier; `options` go to its file system (endpoint, credentials).
    """
    protocol, path = fsspec.utils.get_protocol(url), url
    if protocol in ("file", "local"):
        path = url.split("://", 1)[-1]
        return FileTier(path, budget_bytes)
    return ObjectTier(url, budget_bytes, deadline_s=deadline_s, options=options)


def open_reader(url: str) -> ChunkOpener:
    """For a process that only reads what another's tier keeps below `url`: counts, cleans and changes nothing."""
    if fsspec.utils.get_protocol(url) in ("file", "local"):
        return FileReader(url.split("://", 1)[-1])
    return BucketReader(url)


class FileTier:
    """A ChunkTier in a folder.

    put: reserve, write to a temporary file, fsync, rename, fsync the folder: after a crash a chunk is there whole or
    not at all. A file that is being read may be deleted: its readers go on.
    At the start, files of dead writers are removed and the chunks found are counted, the newest first; if they exceed
    the budget, the rest is deleted, or left to their owners (and not counted) while other writers live in the folder.
    TierError if the folder cannot be used. After close() a tier only reads.
    """

    def __init__(self, root: str | os.PathLike[str], budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._account = Account(budget_bytes)
        self._root = Path(root).expanduser().absolute()
        self._counter = itertools.count()
        with explained(self._root):
            self._temp = _TempFolder(self._root)
            self._adopt()

    @property
    def used_bytes(self) -> int:
        return self._account.used_bytes

    def put(self, key: str, data: Buffer) -> int:
        view, path = byte_view(data), self._path(key)
        with explained(path):
            size = self._size(path)
            num_bytes = len(view) if size is None else size
            with self._account.adding(key, num_bytes, path.exists) as is_new:
                if is_new and size is None:
                    self._write(path, view)
        return self._account.get(key) or num_bytes

    def open(self, key: str) -> ChunkReader:
        with self._found(key) as path:
            return open_file(key, path)

    def read(self, key: str) -> Bytes:
        with self._found(key) as path:
            return read_file(path)

    def delete(self, key: str) -> bool:
        path = self._path(key)
        with self._account.removing(key), explained(path):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            return True

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and self.num_bytes(key) > 0
        except ChunkMissing:
            return False

    def num_bytes(self, key: str) -> int:
        with self._found(key) as path:
            return path.stat().st_size

    def keys(self) -> list[str]:
        return self._account.keys()

    def inventory(self) -> Iterator[tuple[ChunkHeader, int]]:
        for key in self.keys():
            try:
                yield self._read_header(key)
            except CorruptChunk as error:
                _logger.warning("deleting damaged chunk %s: %s", key, error)
                self.delete(key)
            except ChunkMissing:
                continue
            except TierError as error:
                _logger.warning("skipping unreadable chunk %s: %s", key, error)

    def close(self) -> None:
        self._temp.close()

    def _path(self, key: str) -> Path:
        return self._root / chunk_path(key)

    @staticmethod
    def _size(path: Path) -> int | None:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None

    @contextmanager
    def _found(self, key: str) -> Iterator[Path]:
        """Around an access to a committed file: a file that is gone leaves the account and is a ChunkMissing."""
        path = self._path(key)
        with explained(path):
            try:
                yield path
            except FileNotFoundError:
                self._account.forget_unless(key, path.exists)
                raise ChunkMissing(f"chunk {key} is not in {self._root}") from None

    def _read_header(self, key: str) -> tuple[ChunkHeader, int]:
        with self._found(key) as path, closing(open_file(key, path)) as reader:
            return reader.header, reader.num_bytes

    def _write(self, path: Path, view: Bytes) -> None:
        temp = self._temp.path / f"{path.name}.{next(self._counter)}"
        try:
            write_new(temp, view)
            self._make_folder(path.parent)
            temp.replace(path)
            try:
                _sync_folder(path.parent)
            except OSError:
                path.unlink(missing_ok=True)  # visible, but perhaps not for long: no
                raise
        finally:
            with suppress(OSError):
                temp.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            _sync_folder(self._root)

    def _adopt(self) -> None:
        found = sorted(_committed(self._root), reverse=True)
        used = list(itertools.accumulate(size for _, size, _ in found))
        num_kept = sum(total <= self.budget_bytes for total in used)
        for _, size, key in reversed(found[:num_kept]):
            with self._account.adding(key, size):
                pass  # it is there
        if num_kept < len(found):
            self._trim([key for _, _, key in found[num_kept:]])

    def _trim(self, keys: list[str]) -> None:
        if self._temp.has_neighbours:
            _logger.warning("%s holds %d chunks beyond this tier's budget; other writers use it", self._root, len(keys))
            return
        _logger.warning("deleting the %d oldest chunks of %s: they exceed the budget", len(keys), self._root)
        for key in keys:
            self.delete(key)


class _TempFolder:
    """This writer's own folder for unfinished files. Claiming it clears away those of dead writers, and no others."""

    def __init__(self, root: Path) -> None:
        base = root / ".tmp"
        base.mkdir(parents=True, exist_ok=True)
        with (base / "start").open("wb") as start:  # one start at a time: no lock is seen before it is held
            fcntl.flock(start, fcntl.LOCK_EX)
            alive = {lock.stem for lock in base.glob("*.lock") if not _clear_if_dead(lock)}
            for folder in base.iterdir():
                if folder.is_dir() and folder.name not in alive:
                    shutil.rmtree(folder, ignore_errors=True)
            self.has_neighbours = bool(alive)
            self.path = base / uuid.uuid4().hex
            self._lock_path = self.path.with_suffix(".lock")
            self._lock = self._lock_path.open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.mkdir()

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()


def _clear_if_dead(lock_path: Path) -> bool:
    """Remove the lock file if its writer no longer lives; False if it does."""
    with suppress(FileNotFoundError), lock_path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        lock_path.unlink(missing_ok=True)
    return True


def _committed(root: Path) -> Iterator[tuple[int, int, str]]:
    """(mtime in ns, bytes, key) of every chunk file."""
    for folder in os.scandir(root):
        if folder.is_dir() and len(folder.name) == 2:
            for entry in os.scandir(folder.path):
                key = entry.name.removesuffix(CHUNK_SUFFIX)
                if entry.name.endswith(CHUNK_SUFFIX) and key.startswith(folder.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        yield status.st_mtime_ns, status.st_size, key


def _sync_folder(path: Path) -> None:
    """Make a rename in the folder outlive a power failure."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
