"""KV of one turn for benchmarks that need bytes and no answers: random, in a model's shapes, all memory touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from storage.format import ChunkHeader, ChunkReader, LayerShape, encode

Bytes = npt.NDArray[np.uint8]
KV = tuple[npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True)
class TurnKV:
    """The chunks of one turn, in the forms that saving and loading start from and write to."""

    headers: list[ChunkHeader]
    layers: list[list[KV]]
    """Per chunk and layer K and V [head, token, dim], as the engine has them: K a view of the write buffer's
    [token, head, dim], V a part of the pool's [head, all its tokens, dim]."""
    chunks: list[Bytes]
    """The same, encoded."""
    spare: list[Bytes]
    """As many bytes, to be overwritten."""
    out: list[list[KV]]
    """Like `layers` but contiguous: where a load goes to."""

    @property
    def num_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    def encode(self, i: int) -> Bytes:
        return encode(self.headers[i], self.layers[i])

    def copy(self, i: int) -> None:
        """Plain memcpy of an encoded chunk."""
        np.copyto(self.spare[i], self.chunks[i])

    def load(self, i: int, reader: ChunkReader) -> None:
        """Verifies chunk `i` layer by layer and copies it out."""
        for (k_out, v_out), (k, v) in zip(self.out[i], reader.layers()):
            np.copyto(k_out, k)
            np.copyto(v_out, v)


def make_turn_kv(layers: tuple[LayerShape, ...], dtype: str, chunk_tokens: int, num_chunks: int) -> TurnKV:
    headers = [_header(i, layers, dtype, chunk_tokens) for i in range(num_chunks)]
    kv = [[_random_layer(header, shape) for shape in layers] for header in headers]
    chunks = [encode(header, arrays) for header, arrays in zip(headers, kv)]
    return TurnKV(
        headers=headers,
        layers=kv,
        chunks=chunks,
        spare=[np.full_like(chunk, 1) for chunk in chunks],
        out=[[(np.full_like(k, 1, order="C"), np.full_like(v, 1, order="C")) for k, v in arrays] for arrays in kv],
    )


def _header(i: int, layers: tuple[LayerShape, ...], dtype: str, chunk_tokens: int) -> ChunkHeader:
    key = f"{i:02x}" * 32  # as long as a real one
    return ChunkHeader(
        key=key,
        parent=f"{i - 1:02x}" * 32 if i else None,
        root="bench",
        start=i * chunk_tokens,
        token_ids=tuple(range(chunk_tokens)),
        marks=(((i + 1) * chunk_tokens, key),),
        dtype=dtype,
        layers=layers,
    )


def _random_layer(header: ChunkHeader, shape: LayerShape) -> KV:
    def array(*sizes: int) -> npt.NDArray[Any]:
        values = torch.randn(*sizes).to(getattr(torch, header.dtype))
        bits = values if values.dtype == torch.float32 else values.view(torch.int16)
        return bits.numpy().view(header.numpy_dtype)

    num_tokens = header.num_tokens
    keys = array(num_tokens, shape.num_kv_heads, shape.k_dim).transpose(1, 0, 2)
    return keys, array(shape.num_kv_heads, 2 * num_tokens, shape.v_dim)[:, :num_tokens]
