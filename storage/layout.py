"""Where everything of an encoded chunk lies, as it follows from the header alone. Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.framing import LayerFrame, build_head, layer_frame, patch_head, tail_bytes
from storage.header import INDEX_START, Bytes, ChunkHeader, Index, LayerShape, header_to_json, index_to_json

KV = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""K [num_kv_heads, num_tokens, k_dim] and V [num_kv_heads, num_tokens, v_dim] of one layer."""


@dataclass(frozen=True, slots=True)
class Payload:
    """The layers, one after the other. Offsets in `index` count from the end of the head; its checksums are 0 here."""

    frames: tuple[LayerFrame, ...]
    index: Index
    num_bytes: int

    @classmethod
    def of(cls, header: ChunkHeader) -> Payload:
        """ValueError if a layer exceeds Arrow's 2 GiB per column."""
        return _payload(header.layers, header.num_tokens, header.numpy_dtype.itemsize)


@lru_cache(maxsize=256)
def _payload(layers: tuple[LayerShape, ...], num_tokens: int, item_bytes: int) -> Payload:
    """Computed once for all chunks of a model that hold as many tokens."""
    frames = tuple(layer_frame(shape, num_tokens, item_bytes) for shape in layers)
    ends = list(accumulate(frame.num_bytes for frame in frames))
    index = tuple((end - frame.num_bytes, frame.num_bytes, 0) for end, frame in zip(ends, frames))
    return Payload(frames, index, ends[-1])


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a chunk: `frames` and `index` of its payload; the checksums in `head` are 0 as well."""

    header: ChunkHeader
    frames: tuple[LayerFrame, ...]
    index: Index
    head: bytes
    num_bytes: int

    @classmethod
    def of(cls, header: ChunkHeader) -> Layout:
        """ValueError if a layer exceeds Arrow's 2 GiB per column."""
        payload = Payload.of(header)
        head = build_head(header_to_json(header, payload.index))
        return cls(header, payload.frames, payload.index, head, total_bytes(head, payload))

    def sealed_head(self, checksums: Sequence[int]) -> bytes:
        """The head with the layers' checksums in it."""
        index = tuple((offset, length, digest) for (offset, length, _), digest in zip(self.index, checksums))
        return patch_head(self.head, self.head.index(INDEX_START), index_to_json(index))

    def layer_bytes(self, out: Bytes, i: int) -> Bytes:
        """The range of layer `i` in the bytes of the whole chunk."""
        offset, length, _ = self.index[i]
        start = len(self.head) + offset
        return out[start : start + length]

    def layer_views(self, out: Bytes) -> list[KV]:
        """K and V of every layer inside the bytes of the whole chunk."""
        return [layer_arrays(self.header, i, frame, self.layer_bytes(out, i)) for i, frame in enumerate(self.frames)]


def total_bytes(head: bytes, payload: Payload) -> int:
    """Length of the whole chunk."""
    return len(head) + payload.num_bytes + tail_bytes(len(head), len(payload.frames))


def layer_arrays(header: ChunkHeader, i: int, frame: LayerFrame, raw: Bytes) -> KV:
    """K and V inside the bytes of layer `i`, no copy."""
    dtype, shape, tokens = header.numpy_dtype, header.layers[i], header.num_tokens
    k = np.ndarray((shape.num_kv_heads, tokens, shape.k_dim), dtype, buffer=raw, offset=len(frame.before_k))
    v = np.ndarray((shape.num_kv_heads, tokens, shape.v_dim), dtype, buffer=raw, offset=frame.v_offset)
    return k, v
