"""Writing and reading a folder's chunks, beside raw files of the same bytes on the same disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cluster.bench.kv import Bytes, TurnKV
from cluster.bench.timing import Case, Samples, drain, each, side_by_side, timed
from storage.filesystem import FileTier

RAW_READ_BYTES = 64 << 10  # from the page cache any size is as fast; from the disk small reads overlap with read-ahead


def measure_ssd(turn: TurnKV, folder: Path, repeats: int) -> Samples:
    """Reads come after all writes: a raw read and a tier's read of the same bytes each time."""
    everyone = range(len(turn.chunks))
    tier = FileTier(folder / "tier", budget_bytes=4 * turn.num_bytes)
    keys = [header.key for header in turn.headers]
    raw = [folder / f"raw-{i}" for i in everyone]

    def write(i: int) -> None:
        tier.put(keys[i], turn.chunks[i])

    def write_raw(i: int) -> None:
        _write_raw(raw[i], turn.chunks[i])

    def fresh(do: Callable[[], Any]) -> float:
        """Without files of an earlier round; removing them is not counted."""
        for i in everyone:
            tier.delete(keys[i])
            raw[i].unlink(missing_ok=True)
        return timed(do)

    def cold(do: Callable[[], Any]) -> float:
        forget_pages(folder)
        return timed(do)

    with ThreadPoolExecutor(4) as pool:
        writes: dict[str, Case] = {
            "raw_write": lambda: fresh(lambda: each(write_raw, everyone)),
            "ssd_write": lambda: fresh(lambda: each(write, everyone)),
            "raw_write_4": lambda: fresh(lambda: drain(pool.map(write_raw, everyone))),
            "ssd_write_4": lambda: fresh(lambda: drain(pool.map(write, everyone))),
        }
        samples = side_by_side(writes, repeats)
    for i in everyone:
        write(i)
        write_raw(i)
    read = partial(each, lambda i: turn.load(i, tier.open(keys[i])), everyone)
    read_raw = partial(each, lambda i: _read_raw(raw[i], turn.spare[i]), everyone)
    reads: dict[str, Case] = {
        "raw_read": read_raw,
        "ssd_read": read,
    }
    samples |= side_by_side(reads, repeats)
    samples |= side_by_side({"raw_read_cold": lambda: cold(read_raw), "ssd_read_cold": lambda: cold(read)}, repeats)
    tier.close()
    return samples


def _write_raw(path: Path, data: Bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        position = 0
        while position < len(data):
            position += os.write(handle, data[position:].data)
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_raw(path: Path, out: Bytes) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        position = 0
        while position < len(out):
            position += os.preadv(handle, [out[position : position + RAW_READ_BYTES].data], position)
    finally:
        os.close(handle)


def forget_pages(folder: Path) -> None:
    """The files below the folder leave the page cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
