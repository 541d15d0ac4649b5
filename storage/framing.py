"""The Arrow IPC file around a chunk's bytes: one schema message, one record batch per layer, one footer.

    | head: magic, schema message, xxh3 of all before it | layer 0 | layer 1 | ... | tail: end mark, footer, magic |

    layer = before_k + K + before_v + V + after_v         (a whole record batch message: one range, one checksum)

Everything but K and V is a function of the shapes, so the framing is made of constants and the payload can be written
in place; pyarrow's own writer could neither be sealed afterwards nor align data to 64 bytes. Rows are kv heads, the
columns `k` and `v` hold a head's [num_tokens, dim] bytes as `binary`. The three flatbuffers are laid out by hand after
Arrow's format/Message.fbs, Schema.fbs and File.fbs, except the schema, which pyarrow writes and reads. Any Arrow reader
can open the file; ours trusts only the head's checksum and the layer index in it, and never parses batch or footer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from storage.header import Buffer, CorruptChunk, Index, LayerShape

ALIGNMENT = 64
HEAD_PREFIX_BYTES = 16
"""Enough of a file to know how long its head is."""
MIN_FILE_BYTES = 128

_MAGIC = b"ARROW1"
_CONTINUATION = b"\xff\xff\xff\xff"
_METADATA_KEY = b"reprise"
_METADATA_V5 = 4
_RECORD_BATCH = 3  # MessageHeader union
_CHECKSUM_BYTES = 8
_MAX_HEAD_BYTES = 1 << 28
_MAX_COLUMN_BYTES = (1 << 31) - 1  # offsets of a `binary` column are int32
_SCHEMA = pa.schema([pa.field(name, pa.binary(), nullable=False) for name in ("k", "v")])
_FOOTER = struct.Struct("<I 6H iIIh2x 4xI")
_BLOCK = struct.Struct("<qi4xq")
_END_OF_STREAM = _CONTINUATION + bytes(4)


def checksum(data: Buffer) -> int:
    """xxh3-64 of contiguous bytes."""
    lent: Any = data
    return xxhash.xxh3_64_intdigest(lent)


def padding(num_bytes: int) -> int:
    """Bytes to the next multiple of 64."""
    return -num_bytes % ALIGNMENT


@dataclass(frozen=True)
class LayerFrame:
    """The constant bytes around K and V of one layer. Frames are shared by many chunks: sizes are computed once."""

    before_k: bytes
    k_bytes: int
    before_v: bytes
    v_bytes: int
    after_v: bytes

    @cached_property
    def v_offset(self) -> int:
        return len(self.before_k) + self.k_bytes + len(self.before_v)

    @cached_property
    def num_bytes(self) -> int:
        return self.v_offset + self.v_bytes + len(self.after_v)

    @cached_property
    def message_bytes(self) -> int:
        """How much of `before_k` is the record batch message; the rest belongs to its body."""
        return 8 + int(struct.unpack_from("<i", self.before_k, 4)[0])


@lru_cache(maxsize=256)
def layer_frame(shape: LayerShape, num_tokens: int, item_bytes: int) -> LayerFrame:
    """ValueError if a column would exceed Arrow's 2 GiB."""
    k_row, v_row = (num_tokens * dim * item_bytes for dim in (shape.k_dim, shape.v_dim))
    k_bytes, v_bytes = shape.num_kv_heads * k_row, shape.num_kv_heads * v_row
    if max(k_bytes, v_bytes) > _MAX_COLUMN_BYTES:
        raise ValueError(f"{num_tokens} tokens of {shape} exceed 2 GiB in one layer: use smaller chunks")
    offsets_bytes = 4 * (shape.num_kv_heads + 1)
    offsets_padded = offsets_bytes + padding(offsets_bytes)
    k_at = offsets_padded
    v_offsets_at = k_at + k_bytes + padding(k_bytes)
    v_at = v_offsets_at + offsets_padded
    body_bytes = v_at + v_bytes + padding(v_bytes)
    buffers = [(0, 0), (0, offsets_bytes), (k_at, k_bytes), (k_at, 0), (v_offsets_at, offsets_bytes), (v_at, v_bytes)]
    return LayerFrame(
        before_k=_batch_message(shape.num_kv_heads, buffers, body_bytes) + _row_offsets(shape.num_kv_heads, k_row),
        k_bytes=k_bytes,
        before_v=bytes(padding(k_bytes)) + _row_offsets(shape.num_kv_heads, v_row),
        v_bytes=v_bytes,
        after_v=bytes(padding(v_bytes)),
    )


def _row_offsets(num_rows: int, row_bytes: int) -> bytes:
    offsets = (np.arange(num_rows + 1, dtype=np.int64) * row_bytes).astype("<i4").tobytes()
    return offsets + bytes(padding(len(offsets)))


def _batch_message(num_rows: int, buffers: Sequence[tuple[int, int]], body_bytes: int) -> bytes:
    """Message{V5, RecordBatch{num_rows, two nodes, six buffers}}, encapsulated and padded; positions in comments."""
    flat = struct.pack(
        "<I 6H iIqhBx 5H2x iIqI I",
        *(16,),  # 0: root table
        *(12, 20, 16, 18, 4, 8),  # 4: vtable: own size, table size, version, header_type, header, bodyLength
        *(12, 48 - 20, body_bytes, _METADATA_V5, _RECORD_BATCH),  # 16: Message; the header field stands at 20
        *(10, 20, 8, 4, 16),  # 36: vtable: own size, table size, length, nodes, buffers
        *(12, 68 - 52, num_rows, 108 - 64),  # 48: RecordBatch; nodes field at 52, buffers field at 64
        *(2,),  # 68: nodes
    )
    flat += struct.pack("<4q", num_rows, 0, num_rows, 0)  # 72: (length, null count) per column
    flat += struct.pack("<4xI", len(buffers))  # 104: count at 108, elements at 112
    flat += b"".join(struct.pack("<2q", *buffer) for buffer in buffers)
    return _encapsulate(flat, 0)


def _encapsulate(flat: bytes, position: int, reserved: int = 0) -> bytes:
    """Message prefix, flatbuffer, and zeros so that the body (after `reserved` bytes) starts at a multiple of 64."""
    num_bytes = 8 + len(flat) + reserved
    fill = padding(position + num_bytes)
    return _CONTINUATION + struct.pack("<i", num_bytes - 8 + fill) + flat + bytes(fill)


def build_head(document: bytes) -> bytes:
    """Magic and schema message with `document` in its metadata; the last 8 bytes are the xxh3-64 of all before them.

    They lie in the padding of the schema message, where Arrow readers do not look.
    """
    serialized = _SCHEMA.with_metadata({_METADATA_KEY: document}).serialize().to_pybytes()
    return _signed(_MAGIC + b"\0\0" + _encapsulate(serialized[8:], 8, _CHECKSUM_BYTES))


def patch_head(head: bytes, position: int, text: bytes) -> bytes:
    """The head with `text` at a position within its document, signed anew."""
    return _signed(head[:position] + text + head[position + len(text) : -_CHECKSUM_BYTES])


def _signed(head: bytes) -> bytes:
    """The head, whole, from all of it but its checksum."""
    return head + struct.pack("<Q", checksum(head))


def head_bytes(prefix: bytes) -> int:
    """Length of the head, from the first HEAD_PREFIX_BYTES of a file. CorruptChunk if they are no such thing."""
    if len(prefix) < HEAD_PREFIX_BYTES or prefix[:12] != _MAGIC + b"\0\0" + _CONTINUATION:
        raise CorruptChunk("not an Arrow IPC file")
    num_bytes = HEAD_PREFIX_BYTES + int(struct.unpack_from("<i", prefix, 12)[0])
    if num_bytes % ALIGNMENT or not HEAD_PREFIX_BYTES < num_bytes <= _MAX_HEAD_BYTES:
        raise CorruptChunk(f"impossible head of {num_bytes} bytes")
    return num_bytes


def open_head(head: bytes) -> bytes:
    """The document of a whole head. The checksum is verified before anything is parsed; CorruptChunk."""
    (stored,) = struct.unpack("<Q", head[-_CHECKSUM_BYTES:])
    if checksum(head[:-_CHECKSUM_BYTES]) != stored:
        raise CorruptChunk("the header does not match its checksum")
    try:
        metadata = pa.ipc.read_schema(pa.py_buffer(head[8:])).metadata or {}
        return bytes(metadata[_METADATA_KEY])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise CorruptChunk(f"an Arrow file, but no chunk: {error!r}") from error


def build_tail(head: bytes, index: Index, frames: Sequence[LayerFrame]) -> bytes:
    """End-of-stream mark, Footer{V5, schema (as in the head), one block per layer}, its length and the magic."""
    schema = head[HEAD_PREFIX_BYTES:-_CHECKSUM_BYTES]
    schema_at = _FOOTER.size + _BLOCK.size * len(index)
    footer = _FOOTER.pack(
        *(16,),  # 0: root table
        *(12, 16, 12, 4, 0, 8),  # 4: vtable: own size, table size, version, schema, (dictionaries), recordBatches
        *(12, schema_at + _schema_table(schema) - 20, 36 - 24, _METADATA_V5),  # 16: Footer; its fields at 20 and 24
        *(len(index),),  # 36: blocks, elements at 40
    )
    blocks = [
        _BLOCK.pack(len(head) + offset, frame.message_bytes, length - frame.message_bytes)
        for (offset, length, _), frame in zip(index, frames)
    ]
    footer = b"".join([footer, *blocks, schema])
    return _END_OF_STREAM + footer + struct.pack("<i", len(footer)) + _MAGIC


def tail_bytes(head_bytes: int, num_layers: int) -> int:
    """Length of build_tail behind a head of that length."""
    schema_bytes = head_bytes - HEAD_PREFIX_BYTES - _CHECKSUM_BYTES
    footer_bytes = _FOOTER.size + _BLOCK.size * num_layers + schema_bytes
    return len(_END_OF_STREAM) + footer_bytes + 4 + len(_MAGIC)


def _schema_table(message: bytes) -> int:
    """Position of the Schema table inside a schema Message flatbuffer (offsets in flatbuffers are relative)."""
    (table,) = struct.unpack_from("<I", message, 0)
    (to_vtable,) = struct.unpack_from("<i", message, table)
    (header_field,) = struct.unpack_from("<H", message, table - to_vtable + 8)
    (to_header,) = struct.unpack_from("<I", message, table + header_field)
    return int(table + header_field + to_header)
