"""Azure's LLM inference traces (github.com/Azure/AzurePublicDataset, 2023 and 2024): CSV, lengths only.

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44              2023: seven decimals, no time zone
    2024-05-10 00:00:00.009930+00:00,1452,13        2024: with a time zone, decimals only where there are any

Nothing tells which requests belong together: each is a session of its own, and block_tokens is 0. Arrivals count from
the first one. A trace of a week has tens of millions of rows: give a limit.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from policies.simulator.readers.files import lines
from policies.simulator.readers.rows import Rows
from policies.simulator.trace import Request, Trace, TraceError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, kw_only=True)
class Azure:
    """Reads the format above."""

    @staticmethod
    def recognises(head: bytes) -> bool:
        first = head.split(b"\n", 1)[0].lower()
        return all(column.lower().encode() in first for column in COLUMNS)

    def read(self, url: str, name: str, limit: int | None) -> Trace:
        """At most the first `limit` rows. Row numbers in messages count lines, the header being line 1."""
        rows = Rows(url, block_tokens=0)
        found: list[tuple[int, datetime, int, int]] = []
        for row, (time, num_context, num_generated) in _records(url):
            num_input = rows.count(row, COLUMNS[1], _number(num_context), 1)
            num_output = rows.count(row, COLUMNS[2], _number(num_generated))
            found.append((row, _time(rows, row, time), num_input, num_output))
            if len(found) == limit:
                break
        found.sort(key=lambda record: record[1])
        for number, (row, arrived, num_input, num_output) in enumerate(found):
            request = Request(
                request_id=number,
                session_id=number,
                arrival_s=(arrived - found[0][1]).total_seconds(),
                input_tokens=num_input,
                output_tokens=num_output,
            )
            rows.add(row, request)
        return rows.trace(name)


def _records(url: str) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """(line number, the three fields)."""
    numbered = lines(url)
    header = [column.strip().lower() for column in next(csv.reader(line for _, line in numbered), [])]
    missing = [column for column in COLUMNS if column.lower() not in header]
    if missing:
        raise TraceError(f"{url}:1: no column {', '.join(missing)}: the header must be {','.join(COLUMNS)}")
    first, second, third = (header.index(column.lower()) for column in COLUMNS)
    for row, line in numbered:
        record = next(csv.reader([line]))
        if len(record) != len(header):
            what = f"{len(record)} fields instead of {len(header)}"
            raise TraceError(f"{url}:{row}: {what}: mend or remove the row")
        yield row, (record[first], record[second], record[third])


def _number(text: str) -> object:
    """What is not a number stays text."""
    try:
        return float(text)
    except ValueError:
        return text


def _time(rows: Rows, row: int, text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        advice = "write it as 2024-05-10 00:00:00.009930+00:00; mend or remove the row"
        raise rows.fault(row, f"TIMESTAMP is {text[:40]!r}", advice) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
