"""Reading traces: one file per format, told apart by what is in them.

    trace = read_trace("traces/chat.parquet")
    trace = read_trace("sharegpt.json.gz", format="sharegpt:sessions_per_s=2,window_tokens=4096", limit=1000)

| format   | what | blocks |
|---|---|---|
| parquet  | the laboratory's own schema | as recorded |
| mooncake | Mooncake's JSONL, sessions inferred | as recorded |
| azure    | Azure's CSV of 2023 and 2024 | none, every request a session |
| sharegpt | conversations without times | from the messages |
| batch    | `turns.jsonl` of our batch jobs, or their folder | none |
| events   | the scheduler's own event log | from the prompts' marks |

Another format is a class with the verbs of `Reader` and a line in FORMATS.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from policies.simulator.readers.azure import Azure
from policies.simulator.readers.batch_results import FILE as BATCH_FILE
from policies.simulator.readers.batch_results import BatchResults
from policies.simulator.readers.events import Events
from policies.simulator.readers.files import head, kind_of
from policies.simulator.readers.mooncake import Mooncake
from policies.simulator.readers.parquet import Parquet
from policies.simulator.readers.sharegpt import ShareGpt
from policies.simulator.spec import from_spec
from policies.simulator.trace import Trace, TraceError


class Reader(Protocol):
    """Reads one format; its choices are the fields of a frozen dataclass."""

    @staticmethod
    def recognises(head: bytes) -> bool:
        """Whether a file that begins so is of this format."""

    def read(self, url: str, name: str, limit: int | None) -> Trace:
        """The trace in the file, at most its first `limit` records. Raises TraceError of one line."""


FORMATS: dict[str, type[Reader]] = {
    "parquet": Parquet,
    "azure": Azure,
    "mooncake": Mooncake,
    "batch": BatchResults,
    "events": Events,
    "sharegpt": ShareGpt,
}
"""In the order in which they are tried."""


def read_trace(path_or_url: str | Path, *, format: str | None = None, limit: int | None = None) -> Trace:  # noqa: A002
    """The trace in a file.

    `format`: one of FORMATS, perhaps with choices (`mooncake:block_tokens=256`); None: told by the content. `limit`: at
    most the first so many records of the file (rows, turns or conversations), before anything is sorted. Requests are
    in the order of their arrival. Raises TraceError about the file, and ValueError about `format` and `limit`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: choose 1 or more, or leave it out")
    url = _file(str(path_or_url))
    reader = from_spec("format", FORMATS, format) if format is not None else _recognised(url)
    return reader.read(url, _name(url), limit)


def _file(url: str) -> str:
    """`url`, or the batch results in it if it is their folder."""
    kind = kind_of(url)
    if kind == "folder":
        inside = f"{url.rstrip('/')}/{BATCH_FILE}"
        if kind_of(inside) != "file":
            raise TraceError(f"{url} is a folder without {BATCH_FILE}: name one of its files")
        return inside
    if kind == "nothing":
        raise TraceError(f"{url} does not exist: check the path (relative to where the command runs) or URL")
    return url


def _recognised(url: str) -> Reader:
    found = _format_of(url)
    if found is None:
        known = ", ".join(FORMATS)
        raise TraceError(f"{url} is not a trace of a known format ({known}): convert it, or name its format")
    return FORMATS[found]()


def _format_of(url: str) -> str | None:
    begin = head(url)
    if not begin.strip():
        raise TraceError(f"{url} is empty: name a file with at least one request")
    return next((name for name, reader in FORMATS.items() if reader.recognises(begin)), None)


def _name(url: str) -> str:
    """The file's name without its endings; of batch results, their folder's."""
    parts = url.rstrip("/").split("/")
    if parts[-1] == BATCH_FILE and len(parts) > 1:
        return parts[-2]
    return parts[-1].split(".")[0] or parts[-1]
