"""The laboratory's own format: Parquet, one row a request, with its blocks.

    request_id arrival_s session_id turn parent_request input_tokens output_tokens      required; a parent of -1 or null
    think_s                                                                             is none
    block_tokens block_hashes                                                           left out: only lengths are known
    tenant priority                                                                     left out: "" and 0

Blocks are int64 ids of prefixes. They are taken out of Arrow's buffers as they lie there, never one by one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from policies.simulator.readers.files import opened_at_random
from policies.simulator.readers.rows import Rows
from policies.simulator.trace import Request, Trace, TraceError

REQUIRED = ("request_id", "arrival_s", "session_id", "turn", "parent_request", "input_tokens", "output_tokens")
OPTIONAL = ("think_s", "block_tokens", "tenant", "priority")
BLOCKS = "block_hashes"
BATCH_ROWS = 1024
ID_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """Reads the format above."""

    @staticmethod
    def recognises(head: bytes) -> bool:
        return head.startswith(b"PAR1")

    def read(self, url: str, name: str, limit: int | None) -> Trace:
        """At most the first `limit` rows. Raises TraceError."""
        with opened_at_random(url) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            missing = [column for column in REQUIRED if column not in names]
            if missing:
                what = f"{url} is Parquet, but not a trace: it has no {', '.join(missing)}"
                raise TraceError(f"{what}: name its columns {', '.join(REQUIRED)}")
            columns = [column for column in (*REQUIRED, *OPTIONAL, BLOCKS) if column in names]
            rows: Rows | None = None
            for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
                if limit is not None:
                    batch = batch.slice(0, limit - (len(rows) if rows else 0))
                rows = rows or Rows(url, _block_tokens(url, batch))
                _add(rows, batch)
                if len(rows) == limit:
                    break
        return (rows or Rows(url, 0)).trace(name)


def _block_tokens(url: str, batch: Any) -> int:
    """Of the first row, for all."""
    if "block_tokens" not in batch.schema.names or not batch.num_rows:
        return 0
    return Rows(url, 0).count(1, "block_tokens", batch.column("block_tokens")[0].as_py())


def _add(rows: Rows, batch: Any) -> None:
    first_row = len(rows) + 1
    names = [name for name in batch.schema.names if name != BLOCKS]
    columns = [batch.column(name).to_pylist() for name in names]
    for row, values, blocks in zip(range(first_row, first_row + batch.num_rows), zip(*columns), _blocks(rows, batch)):
        rows.add(row, _request(rows, row, dict(zip(names, values)), blocks))


def _request(rows: Rows, row: int, values: dict[str, Any], blocks: Sequence[int]) -> Request:
    size = values.get("block_tokens", 0)
    if size != rows.block_tokens:
        raise rows.fault(row, f"block_tokens is {size}, before {rows.block_tokens}", "use one size in a file")
    parent, think_s = values["parent_request"], values.get("think_s")
    return Request(
        request_id=rows.count(row, "request_id", values["request_id"]),
        session_id=rows.count(row, "session_id", values["session_id"]),
        arrival_s=rows.seconds(row, "arrival_s", values["arrival_s"]),
        input_tokens=rows.count(row, "input_tokens", values["input_tokens"], 1),
        output_tokens=rows.count(row, "output_tokens", values["output_tokens"]),
        turn=rows.count(row, "turn", values["turn"]),
        parent=None if parent in (None, -1) else rows.count(row, "parent_request", parent),
        think_s=None if think_s is None else rows.seconds(row, "think_s", think_s),
        blocks=blocks,
        tenant=values.get("tenant") or "",
        priority=rows.count(row, "priority", values.get("priority") or 0),
    )


def _blocks(rows: Rows, batch: Any) -> Iterator[Sequence[int]]:
    """The blocks of each row."""
    if BLOCKS not in batch.schema.names:
        yield from ((),) * batch.num_rows
        return
    lists = batch.column(BLOCKS)
    if lists.type != pa.list_(pa.int64()):
        lists = lists.cast(pa.list_(pa.int64()))
    ids = lists.values
    if ids.null_count:
        row = next(row for row, cell in enumerate(lists.to_pylist(), len(rows) + 1) if cell and None in cell)
        raise rows.fault(row, f"{BLOCKS} holds a null", "every block needs an id; mend or remove the row")
    data = memoryview(ids.buffers()[1] or b"").cast("B")
    offsets = [(ids.offset + offset) * ID_BYTES for offset in lists.offsets.to_pylist()]
    for start, end in pairwise(offsets):
        blocks = array("q")
        blocks.frombytes(data[start:end])
        yield blocks
