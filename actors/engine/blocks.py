"""HBM: which blocks are free (BlockPool), which belong to a turn (BlockTable), and the tensors themselves (KVPool).

Bookkeeping is plain Python and belongs to the engine's thread. A block may have several holders: the turns that compute
with it (a shared prefix has many), a loader or saver that still works on it, and the wish to keep it for later turns.

Shapes: B block_tokens, H kv heads, D head dim. A row is one token's place in the pool: block * B + offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from actors.engine.free_runs import FreeRuns, runs_of
from storage.format import LayerShape


class BlockState(StrEnum):
    """What keeps a block."""

    FREE = "free"
    HELD = "held"
    """A turn computes with it."""
    KEPT = "kept"
    """No turn, but its KV may be wanted again: may be let go at any time."""
    PENDING = "pending"
    """Only a helper that still reads or writes it: comes back by itself."""


class BlockPool:
    """Block ids 0 .. num_blocks - 1, each with its turns, its helpers (loader, saver), and whether it is kept."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = FreeRuns(num_blocks)
        self._turns = [0] * num_blocks
        self._helpers = [0] * num_blocks
        self._kept = [0] * num_blocks
        self._counts = dict.fromkeys(BlockState, 0)
        self._counts[BlockState.FREE] = num_blocks

    def count(self, state: BlockState) -> int:
        return self._counts[state]

    @property
    def num_free(self) -> int:
        return self._counts[BlockState.FREE]

    def state(self, block: int) -> BlockState:
        if self._turns[block]:
            return BlockState.HELD
        if self._helpers[block]:
            return BlockState.PENDING
        return BlockState.KEPT if self._kept[block] else BlockState.FREE

    def take(self, count: int, after: int | None = None, spare: int = 0) -> list[int]:
        """`count` free blocks for one turn, neighbours if possible: those behind `after`, or others with `spare` free
        ones behind them. Raises ValueError, and takes none, if there are not so many."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks wanted, {self.num_free} free")
        taken = self._free.take(count, after, spare)
        for block in taken:
            self._turns[block] = 1
        self._counts[BlockState.FREE] -= count
        self._counts[BlockState.HELD] += count
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """One more turn for blocks that are not free."""
        for block in blocks:
            if self.state(block) is BlockState.FREE:
                raise ValueError(f"block {block} is free and cannot be held")
            self._change(block, self._turns, 1)

    def release(self, blocks: Sequence[int]) -> None:
        """One turn less. Raises ValueError, and releases none, for a block that no turn holds."""
        for block in blocks:
            if not self._turns[block]:
                raise ValueError(f"block {block} is free already")
        self._drop(blocks, self._turns)

    def pin(self, blocks: Iterable[int]) -> None:
        """A helper reads or writes these blocks, which a turn holds."""
        for block in blocks:
            assert self._turns[block], "a helper works for a turn"
            self._change(block, self._helpers, 1)

    def unpin(self, blocks: Iterable[int]) -> None:
        self._drop(blocks, self._helpers)

    def keep(self, blocks: Iterable[int]) -> None:
        """They stay when their turn lets go, until `let_go`."""
        for block in blocks:
            assert self._turns[block], "it is the turn that computed them that leaves them"
            assert not self._kept[block], "kept once"
            self._kept[block] = 1

    def let_go(self, blocks: Iterable[int]) -> None:
        self._drop(blocks, self._kept)

    def _drop(self, blocks: Iterable[int], counts: list[int]) -> None:
        """One holder of a kind less. Neighbours come back together: a long turn's blocks cost no more than a short
        one's."""
        freed = []
        for block in blocks:
            assert counts[block], "nobody of that kind holds it"
            self._change(block, counts, -1)
            if self.state(block) is BlockState.FREE:
                freed.append(block)
        for start, length in runs_of(freed):
            self._free.add(start, length)

    def _change(self, block: int, counts: list[int], by: int) -> None:
        before = self.state(block)
        assert before is not BlockState.FREE, "only `take` takes a free block"
        counts[block] += by
        self._counts[before] -= 1
        self._counts[self.state(block)] += 1

    def check(self) -> None:
        """Raises AssertionError unless free list, holders and counts agree."""
        states = [self.state(block) for block in range(self.num_blocks)]
        free = [block for block, state in enumerate(states) if state is BlockState.FREE]
        assert free == [block for start, length in self._free.runs() for block in range(start, start + length)]
        assert {state: states.count(state) for state in BlockState} == self._counts, "counts are wrong"
        assert min(*self._turns, *self._helpers, 0) == 0


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
    """K (rotated, paired) and V of every layer.

    In memory [H, rows, D]: the tokens of one head lie side by side, as attention reads them and chunks store them; a
    decode step reads its history a third faster than from [rows, H, D]. What is handed out has the tokens first.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def rows(dims: Iterable[tuple[int, int]]) -> list[Tensor]:
            size = num_blocks * block_tokens
            return [torch.zeros(h, size, d, dtype=dtype, device=device).transpose(0, 1) for h, d in dims]

        self.num_blocks, self.block_tokens, self.device = num_blocks, block_tokens, device
        self._key_rows = rows((shape.num_kv_heads, shape.k_dim) for shape in layers)
        self._value_rows = rows((shape.num_kv_heads, shape.v_dim) for shape in layers)
        self.keys = [t.unflatten(0, (num_blocks, block_tokens)) for t in self._key_rows]
        """Per layer, [num_blocks, B, H, D]."""
        self.values = [t.unflatten(0, (num_blocks, block_tokens)) for t in self._value_rows]

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Rotated keys and values [T, H, D] to `rows` [T] (distinct, on the pool's device)."""
        self._key_rows[layer].index_copy_(0, rows, keys)
        self._value_rows[layer].index_copy_(0, rows, values)

    def slice(self, layer: int, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """K and V of neighbouring rows, as views [num_rows, H, D] to read or write."""
        end = first_row + num_rows
        return self._key_rows[layer][first_row:end], self._value_rows[layer][first_row:end]

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V [T, H, D] at `rows` [T] (on the pool's device)."""
        return _select(self._key_rows[layer], rows), _select(self._value_rows[layer], rows)

    def read_values(self, layer: int, rows: Tensor) -> Tensor:
        """A copy of V [T, H, D] at `rows`, in memory [H, T, D]."""
        return _select(self._value_rows[layer], rows)


def _select(tokens_first: Tensor, rows: Tensor) -> Tensor:
    return tokens_first.transpose(0, 1).index_select(1, rows).transpose(0, 1)
