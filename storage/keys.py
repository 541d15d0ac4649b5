"""Chunk identity: a SHA-256 chain over token ids, rooted in everything that must be equal for KV to be exchangeable.

    key(0)   = KeySpace.root()
    key(end) = H(key(start), context_start, tokens[start:end])      start a multiple of C, start < end <= start + C

The key of a mark depends on the tokens before it and on nothing else: not on the other marks, the process, the machine
or PYTHONHASHSEED. This file hashes; it does not know how KV is laid out or where it is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from storage.header import LAYOUT

_ROOT_TAG = b"reprise/root/1\0"
_LINK_TAG = b"reprise/link/1\0"

# Known answers, see self_test().
_TEST_ROOT = "c084943a8558fa249c8bdb0f1f67018d960e38ac35da13399e790369d1578bb7"
_TEST_KEYS = [
    (4, "8d4417b19c9f84f28bd0390a25dc48359bef2907af136287bf11ee2f53c1ce15"),
    (6, "2b14117a54995f4a7aead5d2cf2bea93250d2af66f8d2c7813ef175a4df5a02a"),
    (8, "8fab9a99786c3392b6e5a3cfb75f186dd7820052267e8c401703565d3b6c2b4c"),
    (10, "59487acc7f0cfe4cd380fdedfd0e514e68e7609d7f3b1d7d6064809451c1943c"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySpace:
    """Everything that must be equal for the KV of one engine to be usable by another."""

    model: str
    """Fingerprint of weights and configuration."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dtype: str
    """"float32", "bfloat16" or "float16": the type of the stored KV."""
    layout: str = LAYOUT
    """How the bytes of a layer are arranged; a constant of the chunk format."""
    codec: str = "raw"
    salt: str = ""
    """Keeps tenants apart: equal prompts under different salts share nothing."""

    def root(self) -> str:
        """key(0) of every conversation in this space: 64 hex digits."""
        fields = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(_ROOT_TAG + fields.encode("ascii")).hexdigest()

    def salted(self, salt: str) -> KeySpace:
        """The part of this space that belongs to one tenant."""
        return replace(self, salt=json.dumps([self.salt, salt]))


def chain(
    root: str,
    token_ids: Sequence[int],
    chunk_tokens: int,
    cuts: Iterable[int] = (),
    context_start: int = 0,
) -> list[tuple[int, str]]:
    """The marks of a prompt: ascending (end, key) at every multiple of `chunk_tokens`, every cut and the last token.

    Cuts outside (0, len(token_ids)] are ignored. `context_start` is the number of tokens that a context-window
    truncation dropped (0: none); KV computed after one depends on it. No tokens, no marks.
    ValueError: a root that is not hex, a token id that is not an integer >= 0, a chunk of less than one token.
    """
    if chunk_tokens < 1 or context_start < 0:
        raise ValueError(f"chunk_tokens must be >= 1 and context_start >= 0, got {chunk_tokens} and {context_start}")
    tokens = _token_array(token_ids)
    wanted = sorted({cut for cut in cuts if 0 < cut <= len(tokens)} | {len(tokens)})
    marks: list[tuple[int, str]] = []
    parent = bytes.fromhex(root)
    for start in range(0, len(tokens), chunk_tokens):
        stop = min(start + chunk_tokens, len(tokens))
        ends = [end for end in wanted if start < end < stop]
        digest = hashlib.sha256(_LINK_TAG + parent + context_start.to_bytes(8, "little"))
        for begin, end in zip([start, *ends], [*ends, stop]):
            digest.update(tokens[begin:end].data)
            marks.append((end, digest.hexdigest()))
        parent = digest.digest()
    return marks


def _token_array(token_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    if len(token_ids) == 0:
        return np.empty(0, dtype="<i8")
    tokens = np.asarray(token_ids)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or int(tokens.min()) < 0:
        raise ValueError("token ids must be a flat sequence of integers >= 0")
    return np.ascontiguousarray(tokens, dtype="<i8")


def self_test() -> None:
    """RuntimeError if this process hashes otherwise than every other: its chunks would be unusable elsewhere."""
    space = KeySpace(model="model", tokenizer="tokenizer", dtype="float32", layout="layout", codec="raw", salt="salt")
    keys = chain(space.root(), range(1, 11), chunk_tokens=4, cuts=(6,), context_start=3)
    if space.root() != _TEST_ROOT or keys != _TEST_KEYS:
        raise RuntimeError(
            f"chunk keys computed by this process differ from the known ones ({space.root()}, {keys}): "
            "check the Python and numpy builds of this machine; it must not share a store with others"
        )
