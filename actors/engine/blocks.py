"""HBM: which blocks are free (BlockPool), which belong to a turn (BlockTable), and the tensors themselves (KVPool).

Bookkeeping is plain Python and belongs to the engine's thread. A block may have several holders: the turn that computes
in it and a saver that still reads it; it is free again when the last one lets go.

Shapes: B block_tokens, H kv heads, D head dim. A row is one token's place in the pool: block * B + offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from storage.format import LayerShape


class BlockPool:
    """Reference-counted block ids 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end: low ids, neighbours, first
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks with one holder each. Raises ValueError, and takes none, if there are not so many."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for blocks that have one."""
        for block in blocks:
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is free and cannot be held")
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less; a block without holders is free. Raises ValueError for a block that is free already."""
        for block in reversed(list(blocks)):  # so that neighbours are taken again in ascending order
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is free already")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)

    def check(self) -> None:
        """Raises AssertionError unless free list and holders agree."""
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert {b for b, n in enumerate(self._holders) if n == 0} == set(self._free), "free list and holders disagree"
        assert all(n >= 0 for n in self._holders)


class BlockTable:
    """The blocks of one turn, in token order. `pages` is cached: it is asked for in every layer."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.blocks: list[int] = []
        self._contiguous = True
        self._tensors: dict[torch.device, Tensor] = {}

    def append(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._contiguous = self._contiguous and (not self.blocks or block == self.blocks[-1] + 1)
            self.blocks.append(block)
        self._tensors = {}

    @property
    def num_tokens(self) -> int:
        """Room for so many tokens."""
        return len(self.blocks) * self.block_tokens

    @property
    def first_if_contiguous(self) -> int | None:
        """The first block where all are neighbours in ascending order: then a slice of the pool is the whole prefix."""
        return self.blocks[0] if self._contiguous and self.blocks else None

    def pages(self, device: torch.device) -> Tensor:
        """Block ids as a tensor on `device`."""
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self.blocks, dtype=torch.long).to(device)
        return self._tensors[device]

    def rows(self, start: int, end: int) -> Tensor:
        """Pool rows (CPU) of the tokens [start, end)."""
        first = self.first_if_contiguous
        if first is not None:
            base = first * self.block_tokens
            return torch.arange(base + start, base + end)
        tokens = torch.arange(start, end)
        return self.pages(torch.device("cpu"))[tokens // self.block_tokens] * self.block_tokens + (
            tokens % self.block_tokens
        )


class KVPool:
    """K (rotated, paired) and V of every layer as [num_blocks, B, H, D]."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def tensors(dims: Iterable[tuple[int, int]]) -> list[Tensor]:
            return [torch.zeros(num_blocks, block_tokens, h, d, dtype=dtype, device=device) for h, d in dims]

        self.num_blocks, self.block_tokens, self.device = num_blocks, block_tokens, device
        self.keys = tensors((shape.num_kv_heads, shape.k_dim) for shape in layers)
        self.values = tensors((shape.num_kv_heads, shape.v_dim) for shape in layers)
        self._key_rows = [t.flatten(0, 1) for t in self.keys]
        self._value_rows = [t.flatten(0, 1) for t in self.values]

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Rotated keys and values [T, H, D] to `rows` [T] (distinct, on the pool's device)."""
        self._key_rows[layer].index_copy_(0, rows, keys)
        self._value_rows[layer].index_copy_(0, rows, values)

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V [T, H, D] at `rows` [T] (on the pool's device)."""
        return self._key_rows[layer].index_select(0, rows), self._value_rows[layer].index_select(0, rows)

    def read_values(self, layer: int, rows: Tensor) -> Tensor:
        return self._value_rows[layer].index_select(0, rows)
