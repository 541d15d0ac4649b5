"""What conversations were made of, by name: small records in one SQLite file, the oldest leaving when space is short.

A record is bytes under a key (and a part of it, where one key has several); an owner names all that must go together.
A damaged or unwritable file costs memory of conversations, never a turn: it is set aside, and a new one begun.
This file does not know what is in a record.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, part TEXT NOT NULL, owner TEXT NOT NULL,
    size INTEGER NOT NULL, value BLOB NOT NULL, UNIQUE (key, part)
);
CREATE INDEX IF NOT EXISTS records_by_owner ON records (owner);
"""
_OVERHEAD_BYTES = 200  # of a row and its index entries
_MAX_DELETED = 10_000  # owners
_CLOCKS_S = 0.25  # by which the clocks of two nodes may differ


@dataclass(frozen=True, slots=True)
class Record:
    """`value` under (`key`, `part`). What belongs to `owner` is deleted with it."""

    key: str
    owner: str
    value: bytes
    part: str = ""

    @property
    def size(self) -> int:
        return len(self.value) + _OVERHEAD_BYTES


class Histories:
    """Thread-safe. Without a path the records live in memory."""

    def __init__(self, path: str | Path | None, max_bytes: int) -> None:
        """OSError, with advice, if there is no way to write there."""
        self._lock = threading.Lock()
        self._max_bytes = max_bytes
        self._deleted: OrderedDict[str, float] = OrderedDict()  # owner -> when, of this life
        self._path = Path(path) if path is not None else None
        self._db = self._open()
        self.used_bytes = int(self._db.execute("SELECT coalesce(sum(size), 0) FROM records").fetchone()[0])

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM records").fetchone()[0])

    def put(self, records: Iterable[Record], since: float | None = None) -> None:
        """What was there under the same names is replaced. The records that were written longest ago leave beyond the
        budget. OSError if the disk refuses (it is full, say): then nothing has changed.

        `since` (Unix seconds): what the records are of had begun by then. They are not taken if their owner was deleted
        later."""
        with self._lock:
            used_bytes = self.used_bytes
            try:
                with self._db:
                    for record in records:
                        if since is not None and self._is_deleted(record.owner, since):
                            log.info("a record is not kept: its owner was deleted meanwhile")
                            continue
                        used_bytes += record.size - self._size_of(record)
                        self._db.execute(
                            "INSERT OR REPLACE INTO records (key, part, owner, size, value) VALUES (?, ?, ?, ?, ?)",
                            (record.key, record.part, record.owner, record.size, record.value),
                        )
                    used_bytes -= self._make_room(used_bytes - self._max_bytes)
            except sqlite3.Error as error:
                raise OSError(f"histories are not kept: {error}") from error
            self.used_bytes = used_bytes

    def get(self, keys: Sequence[str], limit: int | None = None) -> list[Record]:
        """What is there under these keys, in the order in which it was written; of each key at most the newest `limit`
        parts."""
        query = "SELECT number, key, owner, value, part FROM records WHERE key = ? ORDER BY number DESC LIMIT ?"
        rows: list[tuple[int, str, str, bytes, str]] = []
        with self._lock:
            for key in dict.fromkeys(keys):
                rows += self._db.execute(query, (key, -1 if limit is None else limit)).fetchall()
        return [Record(*row[1:]) for row in sorted(rows)]

    def delete(self, owner: str) -> int:
        """Everything of this owner; how many records it were."""
        with self._lock, self._db:
            self._note_deleted(owner)
            size = self._db.execute("SELECT coalesce(sum(size), 0) FROM records WHERE owner = ?", (owner,)).fetchone()[
                0
            ]
            count = self._db.execute("DELETE FROM records WHERE owner = ?", (owner,)).rowcount
        with self._lock:
            self.used_bytes -= int(size)
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # no copy stays in the log either
        return count

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _note_deleted(self, owner: str) -> None:
        self._deleted[owner] = time.time()
        self._deleted.move_to_end(owner)
        if len(self._deleted) > _MAX_DELETED:
            self._deleted.popitem(last=False)

    def _is_deleted(self, owner: str, since: float) -> bool:
        deleted = self._deleted.get(owner)
        return deleted is not None and since <= deleted + _CLOCKS_S

    def _size_of(self, record: Record) -> int:
        query = "SELECT size FROM records WHERE key = ? AND part = ?"
        row = self._db.execute(query, (record.key, record.part)).fetchone()
        return int(row[0]) if row is not None else 0

    def _make_room(self, num_bytes: int) -> int:
        """Deletes the oldest until so many bytes are free; how many were freed."""
        freed = 0
        while freed < num_bytes:
            row = self._db.execute("SELECT number, size FROM records ORDER BY number LIMIT 1").fetchone()
            if row is None:
                break
            self._db.execute("DELETE FROM records WHERE number = ?", (row[0],))
            freed += int(row[1])
        return freed

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            return self._connect(":memory:")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._connect(str(self._path))
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot write {self._path} ({error}): choose another file for histories") from error
        except sqlite3.DatabaseError as error:
            aside = self._path.with_name(f"{self._path.name}.damaged")
            log.warning("%s is damaged (%s); it is now %s, and a new one begins", self._path, error, aside.name)
            self._path.replace(aside)
            for suffix in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    self._path.with_name(self._path.name + suffix).unlink()
            return self._connect(str(self._path))

    @staticmethod
    def _connect(where: str) -> sqlite3.Connection:
        db = sqlite3.connect(where, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten
            db.executescript(_SCHEMA)
        except sqlite3.Error:
            db.close()
            raise
        return db
