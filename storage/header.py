"""What a chunk is: its identity, its tokens and the shape of its layers, and how that is written as JSON.

This file knows nothing of Arrow, checksums or places; `storage.format` writes and reads the bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

LAYOUT = "raw-k-paired/head-token-dim/1"
"""K without rotary embedding, in paired channel order; per layer K and V are [num_kv_heads, num_tokens, dim]."""

CODECS = ("raw",)
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2")}
"""Types of stored KV, and the numpy type they travel as (16-bit floats as bit patterns)."""

INDEX_START = b'"index":['
"""Where the index begins in the JSON of a header, and nowhere else: quotes inside of texts are escaped."""

_FORMAT_VERSION = 1
_dumps = json.JSONEncoder(separators=(",", ":")).encode
_POSITIONS_FREE = "free"  # keys are stored without rotary embedding: the chunk may stand at any position

Buffer: TypeAlias = "bytes | bytearray | memoryview | npt.NDArray[Any] | pa.Buffer"
"""Anything contiguous that lends its bytes without a copy."""
Bytes: TypeAlias = npt.NDArray[np.uint8]
Index: TypeAlias = tuple[tuple[int, int, int], ...]
"""Per layer: offset from the end of the head, length, xxh3-64 checksum."""


class CorruptChunk(ValueError):  # noqa: N818 - a state of the data, named like ChunkMissing
    """The bytes are not what was written: truncated, altered, or another chunk. A miss, never an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """K is [num_kv_heads, num_tokens, k_dim] and V [num_kv_heads, num_tokens, v_dim]."""

    num_kv_heads: int
    k_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        if min(self.num_kv_heads, self.k_dim, self.v_dim) < 1:
            raise ValueError(f"a layer needs at least one head and one channel in K and V, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkHeader:
    """The KV of tokens [start, end) of a conversation, all layers.

    `marks` are the (end, key) known inside the chunk, ascending, start < end; the last one is the chunk's own.
    """

    key: str
    parent: str | None
    """Key of [0, start); None for the first chunk of a conversation."""
    root: str
    start: int
    context_start: int = 0
    token_ids: tuple[int, ...]
    marks: tuple[tuple[int, str], ...]
    dtype: str
    codec: str = "raw"
    layers: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        if not self.token_ids or not self.layers:
            raise ValueError("a chunk holds at least one token and one layer")
        if self.start < 0 or self.context_start < 0 or (self.start > 0 and self.parent is None):
            raise ValueError(f"start {self.start} and context_start must be >= 0; a later chunk needs its parent's key")
        if self.dtype not in DTYPES or self.codec not in CODECS:
            raise ValueError(f"dtype {self.dtype!r} or codec {self.codec!r} unknown; use {list(DTYPES)} and {CODECS}")
        ends = [end for end, _ in self.marks]
        if not ends or ends != sorted(set(ends)) or ends[0] <= self.start or self.marks[-1] != (self.end, self.key):
            raise ValueError(f"marks must ascend within ({self.start}, {self.end}] and end with the chunk's own key")

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Element type of the arrays: float32, or uint16 bit patterns."""
        return DTYPES[self.dtype]


def header_to_json(header: ChunkHeader, index: Index) -> bytes:
    """Header, layer index and checksums."""
    document = {
        "format": _FORMAT_VERSION,
        "layout": LAYOUT,
        "positions": _POSITIONS_FREE,
        "key": header.key,
        "parent": header.parent,
        "root": header.root,
        "start": header.start,
        "context_start": header.context_start,
        "token_ids": header.token_ids,
        "marks": header.marks,
        "dtype": header.dtype,
        "codec": header.codec,
        "layers": [(layer.num_kv_heads, layer.k_dim, layer.v_dim) for layer in header.layers],
    }
    return _dumps(document)[:-1].encode("ascii") + b"," + index_to_json(index) + b"}"


def index_to_json(index: Index) -> bytes:
    """The last entry in the JSON of a header. Its length does not depend on the checksums' values."""
    entries = ",".join([f'[{offset},{length},"{checksum:016x}"]' for offset, length, checksum in index])
    return INDEX_START + entries.encode("ascii") + b"]"


def header_from_json(text: bytes) -> tuple[ChunkHeader, Index]:
    """Inverse of header_to_json. CorruptChunk when it is not a header of this format version."""
    try:
        document = json.loads(text)
        marker = (document["format"], document["layout"], document["positions"])
        if marker != (_FORMAT_VERSION, LAYOUT, _POSITIONS_FREE):
            raise CorruptChunk(f"written by another version: {marker}")
        start, context_start, token_ids = (document[name] for name in ("start", "context_start", "token_ids"))
        ends, keys = zip(*document["marks"], strict=True)
        heads, k_dims, v_dims = zip(*document["layers"], strict=True)
        offsets, lengths, checksums = zip(*document["index"], strict=True)
        _check_integers([start, context_start, *token_ids, *ends, *heads, *k_dims, *v_dims, *offsets, *lengths])
        header = ChunkHeader(
            key=_text(document["key"]),
            parent=None if document["parent"] is None else _text(document["parent"]),
            root=_text(document["root"]),
            start=start,
            context_start=context_start,
            token_ids=tuple(token_ids),
            marks=tuple(zip(ends, map(_text, keys))),
            dtype=document["dtype"],
            codec=document["codec"],
            layers=tuple(map(_shape, heads, k_dims, v_dims)),
        )
        index = tuple(zip(offsets, lengths, [int(checksum, 16) for checksum in checksums]))
    except CorruptChunk:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptChunk(f"not a chunk header: {error}") from error
    return header, index


@lru_cache(maxsize=256)
def _shape(num_kv_heads: int, k_dim: int, v_dim: int) -> LayerShape:
    return LayerShape(num_kv_heads=num_kv_heads, k_dim=k_dim, v_dim=v_dim)


def _check_integers(values: list[Any]) -> None:
    if set(map(type, values)) != {int} or min(values) < 0:
        raise TypeError("integers >= 0 expected")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("text expected")
    return value


def byte_view(buffer: Buffer) -> Bytes:
    """The buffer's bytes as a flat uint8 array, without a copy. ValueError if it is not contiguous."""
    try:
        return np.frombuffer(buffer, dtype=np.uint8)
    except (ValueError, BufferError, TypeError) as error:
        raise ValueError(f"chunk bytes must be one contiguous buffer, got {type(buffer).__name__}: {error}") from error
