"""The bytes of a chunk, equal in every tier: an Arrow IPC file (see `storage.framing`) that any Arrow reader opens.

The schema metadata holds the header (tokens, marks, shapes), and for each layer where it lies and its xxh3-64
checksum; the head ends with a checksum of itself. A layer is one contiguous range, so one layer is one ranged read
(a remote file costs one read of the head and one per layer, or a single one for the whole chunk). Nothing is decoded
before its checksum was compared: the head when a chunk is opened, a layer when it is asked for.

Array shapes: K [num_kv_heads, num_tokens, k_dim], V [num_kv_heads, num_tokens, v_dim]; bfloat16 and float16 travel as
uint16 bit patterns, float32 as float32. Little-endian machines only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from storage.framing import (
    HEAD_PREFIX_BYTES,
    MIN_FILE_BYTES,
    LayerFrame,
    build_tail,
    checksum,
    head_bytes,
    open_head,
)
from storage.header import (
    LAYOUT,
    Buffer,
    Bytes,
    ChunkHeader,
    CorruptChunk,
    Index,
    LayerShape,
    byte_view,
    header_from_json,
)
from storage.layout import KV, Layout, Payload, layer_arrays, total_bytes
from storage.recycle import Recycler

__all__ = [
    "LAYOUT",
    "Buffer",
    "ChunkHeader",
    "ChunkReader",
    "CorruptChunk",
    "LayerShape",
    "Layout",
    "RangeSource",
    "encode",
    "encode_into",
    "encoded_size",
    "read_chunk",
    "seal",
]

FIRST_READ_BYTES = 64 * 1024
"""How much of a source is read to get the head; a longer head costs a second read."""

_memory = Recycler(limit_bytes=64 << 20)


# --- writing ----------------------------------------------------------------------------------------------------------


def encoded_size(header: ChunkHeader) -> int:
    """Exact length of the encoded chunk, before encoding. ValueError if a layer exceeds Arrow's 2 GiB per column."""
    return Layout.of(header).num_bytes


def encode(header: ChunkHeader, layers: Sequence[KV], layout: Layout | None = None) -> Bytes:
    """The chunk as one contiguous array of encoded_size(header) bytes; copies each layer once.

    `layout`: the header's, if the caller has made it already. ValueError if the layers are not the arrays that the
    header describes (element types of equal width are taken as bit patterns). The layers need not be contiguous.
    """
    layout = layout or Layout.of(header)
    out = _memory.take(layout.num_bytes)
    views = layout.layer_views(out)
    _check_layers(views, layers)
    checksums = []
    for i, ((k_view, v_view), (k, v)) in enumerate(zip(views, layers)):
        np.copyto(k_view, k.view(k_view.dtype))
        np.copyto(v_view, v.view(v_view.dtype))
        checksums.append(_seal_layer(layout.layer_bytes(out, i), layout.frames[i]))  # while it is in the CPU's cache
    _write_ends(layout, out, checksums)
    return out


def encode_into(header: ChunkHeader, out: Bytes) -> list[KV]:
    """Views into `out` where the layers belong, to be written in place; then seal(header, out).

    `out` is a writable uint8 array of exactly encoded_size(header) bytes. Until it is sealed it is not a chunk.
    """
    layout = Layout.of(header)
    _check_out(layout, out)
    return layout.layer_views(out)


def seal(header: ChunkHeader, out: Bytes) -> None:
    """Make a chunk of the layers written through encode_into: framing and checksums around them, payload untouched."""
    layout = Layout.of(header)
    _check_out(layout, out)
    checksums = [_seal_layer(layout.layer_bytes(out, i), frame) for i, frame in enumerate(layout.frames)]
    _write_ends(layout, out, checksums)


def _check_out(layout: Layout, out: Bytes) -> None:
    fits = out.dtype == np.uint8 and out.shape == (layout.num_bytes,)
    if not fits or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(
            f"needs a writable, contiguous uint8 array of {layout.num_bytes} bytes, got {out.dtype} {out.shape}"
        )


def _check_layers(views: Sequence[KV], layers: Sequence[KV]) -> None:
    if len(layers) != len(views):
        raise ValueError(f"the header describes {len(views)} layers, got {len(layers)}")
    for i, (expected, got) in enumerate(zip(views, layers)):
        for name, view, array in zip("KV", expected, got):
            if (
                array.shape != view.shape
                or array.dtype.itemsize != view.dtype.itemsize
                or array.dtype.kind not in "iuf"
            ):
                raise ValueError(
                    f"{name} of layer {i} must be {view.dtype} {view.shape}, got {array.dtype} {array.shape}"
                )


def _seal_layer(raw: Bytes, frame: LayerFrame) -> int:
    """Write the framing of one layer around its payload; returns its checksum."""
    lent = raw.data
    lent[: len(frame.before_k)] = frame.before_k
    lent[frame.v_offset - len(frame.before_v) : frame.v_offset] = frame.before_v
    lent[frame.num_bytes - len(frame.after_v) :] = frame.after_v
    return checksum(raw)


def _write_ends(layout: Layout, out: Bytes, checksums: Sequence[int]) -> None:
    """Head and tail, last: only with them the bytes are a chunk."""
    head = layout.sealed_head(checksums)
    tail = build_tail(head, layout.index, layout.frames)
    out[: len(head)] = byte_view(head)
    out[len(out) - len(tail) :] = byte_view(tail)


# --- reading ----------------------------------------------------------------------------------------------------------


def _nothing() -> None:
    """Default of RangeSource.close."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeSource:
    """Bytes that are fetched by range, for example from a bucket.

    `read(offset, length)` returns that range, or less if the source ends before; what it raises passes through the
    reader. `num_bytes` is the true length of the source, by which truncation is seen before anything is fetched.
    """

    read: Callable[[int, int], Buffer]
    num_bytes: int
    close: Callable[[], None] = _nothing


class ChunkReader:
    """A chunk over a source: the head is read and verified at once, a layer each time it is asked for.

    Arrays are read-only views of the source's memory where it has one (they stay valid after close()). Layers may be
    read from several threads if the source's `read` allows it.
    """

    def __init__(self, source: RangeSource) -> None:
        self._source = source
        self._start, self._head = _read_head(source)
        self.header, self._index = header_from_json(open_head(self._head))
        payload = _checked_payload(self.header, self._index, source.num_bytes)
        self._frames = payload.frames
        expected = total_bytes(self._head, payload)
        if source.num_bytes != expected:
            raise CorruptChunk(f"{source.num_bytes} bytes where the header says {expected}")

    @property
    def num_bytes(self) -> int:
        """Length of the whole encoded chunk."""
        return self._source.num_bytes

    def layer(self, i: int) -> KV:
        """K and V of layer `i`, verified. CorruptChunk; IndexError; what the source raises."""
        offset, length, stored = self._index[i]
        raw = self._read(len(self._head) + offset, length)
        if checksum(raw) != stored:
            raise CorruptChunk(f"layer {i} of chunk {self.header.key} does not match its checksum")
        k, v = layer_arrays(self.header, i, self._frames[i], raw)
        k.flags.writeable = v.flags.writeable = False
        return k, v

    def layers(self) -> Iterator[KV]:
        """All layers in order, each read and verified when it is reached."""
        return map(self.layer, range(len(self._index)))

    def verify(self) -> None:
        """Compare every byte of the chunk: all layers, and the tail, which follows from the head. CorruptChunk."""
        for i in range(len(self._index)):
            self.layer(i)
        tail = build_tail(self._head, self._index, self._frames)
        if self._read(self.num_bytes - len(tail), len(tail)).tobytes() != tail:
            raise CorruptChunk(f"the footer of chunk {self.header.key} is damaged")

    def close(self) -> None:
        """Let go of the source. Arrays handed out before stay valid."""
        self._start = np.empty(0, dtype=np.uint8)
        self._source.close()

    def _read(self, offset: int, length: int) -> Bytes:
        if offset + length <= len(self._start):  # a small chunk came whole with its head
            return self._start[offset : offset + length]
        raw = byte_view(self._source.read(offset, length))
        if len(raw) != length:
            raise CorruptChunk(f"{len(raw)} bytes at {offset} where {length} were stored")
        return raw


def _read_head(source: RangeSource) -> tuple[Bytes, bytes]:
    """The first read of a source, and the head in it (or, if it is longer, from a second read)."""
    if source.num_bytes < MIN_FILE_BYTES:
        raise CorruptChunk(f"{source.num_bytes} bytes are too few for a chunk")
    start = byte_view(source.read(0, min(FIRST_READ_BYTES, source.num_bytes)))
    num_bytes = head_bytes(start[:HEAD_PREFIX_BYTES].tobytes())
    if num_bytes > source.num_bytes:
        raise CorruptChunk(f"a head of {num_bytes} bytes in {source.num_bytes}")
    if num_bytes > len(start):
        rest = byte_view(source.read(len(start), num_bytes - len(start)))
        start = np.concatenate([start, rest])
    if len(start) < num_bytes:
        raise CorruptChunk(f"the source ends within the head, after {len(start)} bytes")
    return start, start[:num_bytes].tobytes()


def _checked_payload(header: ChunkHeader, index: Index, num_bytes: int) -> Payload:
    """What follows from the shapes; CorruptChunk if the index, or the source's length, does not agree with it."""
    channels = sum(shape.num_kv_heads * (shape.k_dim + shape.v_dim) for shape in header.layers)
    if channels * header.num_tokens * header.numpy_dtype.itemsize > num_bytes:  # before anything is made for them
        raise CorruptChunk(f"{num_bytes} bytes are too few for the layers of chunk {header.key}")
    try:
        payload = Payload.of(header)
    except ValueError as error:
        raise CorruptChunk(str(error)) from error
    if tuple((offset, length, 0) for offset, length, _ in index) != payload.index:
        raise CorruptChunk(f"the layer index of chunk {header.key} does not fit its shapes")
    return payload


def read_chunk(source: Buffer | RangeSource) -> ChunkReader:
    """Open an encoded chunk. CorruptChunk if its head, or its length, is not that of a chunk."""
    if isinstance(source, RangeSource):
        return ChunkReader(source)
    view = byte_view(source)
    return ChunkReader(RangeSource(read=lambda offset, length: view[offset : offset + length], num_bytes=len(view)))
