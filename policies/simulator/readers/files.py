"""Opening traces: any path or URL that Arrow knows (`file://`, `s3://`, `gs://`, …), plain or compressed (`.gz`,
`.zst`, `.bz2`, `.lz4`, told by the name). Every failure is a TraceError of one line.

Knows bytes, lines and JSON, and no format of traces.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from policies.simulator.trace import TraceError

READ_BYTES = 1 << 20
HEAD_BYTES = 1 << 16


@contextmanager
def opened(url: str) -> Iterator[io.BufferedReader]:
    """The file's bytes as a stream, decompressed. Raises TraceError, also for what goes wrong inside the `with`."""
    with _advised(url):
        files, path = _located(url)
        with io.BufferedReader(files.open_input_stream(path, compression="detect"), READ_BYTES) as stream:
            yield stream


@contextmanager
def opened_at_random(url: str) -> Iterator[Any]:
    """The file as an Arrow file that can be read anywhere, not decompressed. Raises TraceError likewise."""
    with _advised(url):
        files, path = _located(url)
        with files.open_input_file(path) as file:
            yield file


def head(url: str) -> bytes:
    """The first HEAD_BYTES, or fewer if the file is shorter."""
    with opened(url) as stream:
        return stream.read(HEAD_BYTES)


def lines(url: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its ending), blank lines left out."""
    number = 0
    with opened(url) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.isspace():
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    what = f"{url}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x})"
                    raise TraceError(f"{what}: convert the file, for example with iconv") from None


def json_lines(url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a file with one JSON object a line.

    A last line without an ending that is not JSON is what a killed writer left behind: it is left out.
    """
    for number, line in lines(url):
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if not line.endswith("\n") and number > 1:
                return
            raise TraceError(f"{url}:{number}: not JSON ({_one_line(error)}): write one object per line") from None
        if not isinstance(value, dict):
            raise TraceError(f"{url}:{number}: a JSON {type(value).__name__}, not an object: write one object per line")
        yield number, value


def kind_of(url: str) -> str:
    """What is there: "file", "folder" or "nothing"."""
    with _advised(url):
        files, path = _located(url)
        found = files.get_file_info(path).type
    return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(found, "nothing")


def _located(url: str) -> tuple[Any, str]:
    if "://" not in url:
        return pafs.LocalFileSystem(), url
    files, path = pafs.FileSystem.from_uri(url)
    return files, path


@contextmanager
def _advised(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise TraceError(f"{url} does not exist: check the path (relative to where the command runs) or URL") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise TraceError(f"{url} cannot be read ({_one_line(error)}): check that it is whole") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
