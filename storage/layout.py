"""Where everything of an encoded chunk lies, as it follows from the header alone. Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy.typing as npt

from storage.framing import LayerFrame, build_head, build_tail, layer_frame
from storage.header import Bytes, ChunkHeader, Index, header_to_json

KV = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""K [num_kv_heads, num_tokens, k_dim] and V [num_kv_heads, num_tokens, v_dim] of one layer."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a chunk. Offsets in `index` count from the end of the head; its checksums are 0 here."""

    header: ChunkHeader
    frames: tuple[LayerFrame, ...]
    index: Index
    head_bytes: int
    num_bytes: int

    @classmethod
    def of(cls, header: ChunkHeader) -> Layout:
        """ValueError if a layer exceeds Arrow's 2 GiB per column."""
        frames = layer_frames(header)
        index = blank_index(frames)
        head = build_head(header_to_json(header, index))
        return cls(header, frames, index, len(head), total_bytes(head, index, frames))

    def layer_bytes(self, out: Bytes, i: int) -> Bytes:
        """The range of layer `i` in the bytes of the whole chunk."""
        offset, length, _ = self.index[i]
        return out[self.head_bytes + offset :][:length]

    def layer_views(self, out: Bytes) -> list[KV]:
        """K and V of every layer inside the bytes of the whole chunk."""
        return [layer_arrays(self.header, i, frame, self.layer_bytes(out, i)) for i, frame in enumerate(self.frames)]


def layer_frames(header: ChunkHeader) -> tuple[LayerFrame, ...]:
    """ValueError if a layer exceeds Arrow's 2 GiB per column."""
    item_bytes = header.numpy_dtype.itemsize
    return tuple(layer_frame(shape, header.num_tokens, item_bytes) for shape in header.layers)


def blank_index(frames: Sequence[LayerFrame]) -> Index:
    """The layers one after the other, with checksums of 0."""
    ends = accumulate(frame.num_bytes for frame in frames)
    return tuple((end - frame.num_bytes, frame.num_bytes, 0) for end, frame in zip(ends, frames))


def total_bytes(head: bytes, index: Index, frames: Sequence[LayerFrame]) -> int:
    """Length of the whole chunk."""
    offset, length, _ = index[-1]
    return len(head) + offset + length + len(build_tail(head, index, frames))


def layer_arrays(header: ChunkHeader, i: int, frame: LayerFrame, raw: Bytes) -> KV:
    """K and V inside the bytes of layer `i`, no copy."""
    dtype, shape, tokens = header.numpy_dtype, header.layers[i], header.num_tokens
    k = raw[len(frame.before_k) :][: frame.k_bytes].view(dtype).reshape(shape.num_kv_heads, tokens, shape.k_dim)
    v = raw[frame.v_offset :][: frame.v_bytes].view(dtype).reshape(shape.num_kv_heads, tokens, shape.v_dim)
    return k, v
