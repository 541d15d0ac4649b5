"""One row a turn, in two forms: a JSONL journal that is flushed with every row, and Parquet parts written as it grows.

The journal is the truth: a killed job resumes from it. A Parquet part appears whole (written aside, then renamed);
rows that were in the journal but in no part when the job died get their part when it resumes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from policies.messages import Cause, Tier

PART_ROWS = 2_000
PART_S = 20.0


class OutputError(ValueError):
    """The results cannot be written, or do not fit what is there; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished turn. Times in seconds on the client's clock; TTFT and end-to-end count from submission."""

    conversation_id: str
    turn: int
    where: str  # file:line of the conversation
    prompt_tokens: int
    answer: str
    answer_token_ids: list[int]
    finish_reason: str  # stop, length, ... or error
    error: str = ""
    reused_tokens: dict[str, int] = field(default_factory=dict)  # by tier
    recomputed_tokens: dict[str, int] = field(default_factory=dict)  # by cause
    drift_at: int | None = None
    submitted_at: float = 0.0  # unix time
    queue_wait_s: float = 0.0
    restore_s: float = 0.0
    ttft_s: float | None = None
    itl_mean_s: float | None = None
    itl_p95_s: float | None = None
    end_to_end_s: float = 0.0
    replica: str = ""
    attempts: int = 1
    retried_tokens: int = 0

    @property
    def answer_tokens(self) -> int:
        return len(self.answer_token_ids)

    @property
    def failed(self) -> bool:
        return bool(self.error)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "answer_tokens": self.answer_tokens}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        return cls(**{name: value for name, value in values.items() if name != "answer_tokens"})


def _counts(names: Iterable[str]) -> pa.DataType:
    return pa.struct([pa.field(name, pa.int64()) for name in names])


SCHEMA = pa.schema(
    [
        ("conversation_id", pa.string()),
        ("turn", pa.int32()),
        ("where", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("answer_tokens", pa.int64()),
        ("answer", pa.string()),
        ("answer_token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
        ("reused_tokens", _counts(Tier)),
        ("recomputed_tokens", _counts(Cause)),
        ("drift_at", pa.int64()),
        ("submitted_at", pa.float64()),
        ("queue_wait_s", pa.float64()),
        ("restore_s", pa.float64()),
        ("ttft_s", pa.float64()),
        ("itl_mean_s", pa.float64()),
        ("itl_p95_s", pa.float64()),
        ("end_to_end_s", pa.float64()),
        ("replica", pa.string()),
        ("attempts", pa.int32()),
        ("retried_tokens", pa.int64()),
    ]
)


def _line(row: Row) -> str:
    return json.dumps(row.to_dict(), ensure_ascii=False) + "\n"


def check_folder(folder: Path, resume: bool) -> None:
    """OutputError if a job could not write there, or would write over another's results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write results to {folder}: {error.strerror}; choose another --out") from error
    journal = folder / "turns.jsonl"
    if not resume and journal.exists() and journal.stat().st_size:
        raise OutputError(f"{journal} exists already: add --resume to go on with it, or choose another --out")


class ResultWriter:
    """Appends rows under `folder`: turns.jsonl and parquet/part-*.parquet. Also a context manager."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        """`settings` identify the run: resuming under different ones is refused. Raises OutputError."""
        self._folder = folder
        self._journal = folder / "turns.jsonl"
        self._parts = folder / "parquet"
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            self.done = self._take_up(settings) if resume else self._begin(settings)
            self._file = self._journal.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write results to {folder}: {error.strerror}; choose another --out") from error
        self._unparted = self._rows_without_part()
        self._last_part = time.monotonic()

    def write(self, row: Row) -> None:
        """Flushed before it returns. Raises OutputError when the disk is full; rows written before are kept."""
        try:
            self._file.write(_line(row))
            self._file.flush()
            self.done.append(row)
            self._unparted.append(row)
            if len(self._unparted) >= PART_ROWS or time.monotonic() - self._last_part > PART_S:
                self._write_part()
        except OSError as error:
            raise OutputError(
                f"cannot write to {self._folder}: {error.strerror}; make room and run again with --resume"
            ) from error

    def close(self) -> None:
        try:
            self._write_part()
        finally:
            self._file.close()

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- beginning and resuming ---------------------------------------------------------------------------------------

    def _begin(self, settings: dict[str, Any]) -> list[Row]:
        check_folder(self._folder, resume=False)
        (self._folder / "run.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return []

    def _take_up(self, settings: dict[str, Any]) -> list[Row]:
        manifest = self._folder / "run.json"
        if not manifest.exists():
            return self._begin(settings)
        before = json.loads(manifest.read_text(encoding="utf-8"))
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise OutputError(
                    f"{self._folder} was begun with {name}={before.get(name)!r}, not {settings.get(name)!r}: "
                    f"resume with the same settings, or choose another --out"
                )
        rows = self._read_journal()
        good = [row for row in rows if not row.failed]
        if len(good) < len(rows):
            self._rewrite(good)
        return good

    def _rewrite(self, rows: list[Row]) -> None:
        """Failed turns are tried again: they leave the journal, and the parts are made anew."""
        aside = self._journal.with_suffix(".tmp")
        aside.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        for part in self._parts.glob("part-*.parquet"):
            part.unlink()
        aside.rename(self._journal)

    def _read_journal(self) -> list[Row]:
        """All whole rows; a line that the killed job left half-written is cut off."""
        if not self._journal.exists():
            return []
        rows, good = [], 0
        with self._journal.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    rows.append(Row.from_dict(json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise OutputError(
                        f"{self._journal}:{len(rows) + 1} is not a row of results ({error}); "
                        f"mend the line or choose another --out"
                    ) from error
                good += len(line)
        os.truncate(self._journal, good)
        return rows

    def _rows_without_part(self) -> list[Row]:
        in_parts = sum(pq.read_metadata(part).num_rows for part in self._parts.glob("part-*.parquet"))
        return self.done[in_parts:]

    def _write_part(self) -> None:
        self._last_part = time.monotonic()
        if not self._unparted:
            return
        number = len(list(self._parts.glob("part-*.parquet")))
        aside = self._parts / f".part-{number:05d}.parquet.tmp"
        pq.write_table(pa.Table.from_pylist([row.to_dict() for row in self._unparted], schema=SCHEMA), aside)
        aside.rename(self._parts / f"part-{number:05d}.parquet")
        self._unparted = []
