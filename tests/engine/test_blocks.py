from __future__ import annotations

import random

import pytest
import torch

from actors.engine.blocks import BlockPool, BlockTable, KVPool
from storage.format import LayerShape


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(4)
    taken = pool.take(3)
    pool.hold(taken[:1])
    pool.release(taken)
    assert pool.num_free == 3
    pool.release(taken[:1])
    assert pool.num_free == 4
    pool.check()


def test_blocks_that_come_back_are_neighbours_again() -> None:
    pool = BlockPool(8)
    first, second = pool.take(4), pool.take(3)
    for block in (*first[::2], *second, *first[1::2]):
        pool.release([block])
    assert pool.take(8) == list(range(8))


def test_turns_that_run_together_grow_in_place() -> None:
    """Eight turns of 20 blocks that get ten more, one by one in turn, in a pool with room for it and little besides."""
    pool, tables = BlockPool(8 * 32), [BlockTable(4) for _ in range(8)]
    for table in tables:
        table.append(pool.take(20, spare=12))
    for _ in range(10):
        for table in tables:
            table.append(pool.take(1, after=table.blocks[-1], spare=2))
    assert all(table.first_if_contiguous is not None for table in tables)
    pool.check()


def test_taking_too_many_takes_none() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="3 blocks wanted, 2 free"):
        pool.take(3)
    assert pool.num_free == 2


def test_freeing_twice_and_holding_a_free_block_are_errors() -> None:
    pool = BlockPool(2)
    [block] = pool.take(1)
    pool.release([block])
    with pytest.raises(ValueError, match="free already"):
        pool.release([block])
    with pytest.raises(ValueError, match="cannot be held"):
        pool.hold([block])
    pool.check()


def test_random_use_never_hands_out_a_held_block() -> None:
    rng = random.Random(0)
    pool = BlockPool(20)
    held: list[int] = []
    for _ in range(2000):
        action = rng.choice(["take", "hold", "release"])
        if action == "take" and pool.num_free:
            taken = pool.take(rng.randint(1, pool.num_free))
            assert not set(taken) & set(held)
            held += taken
        elif held:
            block = rng.choice(held)
            if action == "hold":
                pool.hold([block])
                held.append(block)
            else:
                pool.release([block])
                held.remove(block)
        assert pool.num_free == 20 - len(set(held))
    pool.check()


@pytest.mark.parametrize(("blocks", "first"), [([3, 4, 5], 3), ([3, 5, 4], None), ([], None)])
def test_rows_of_neighbours_and_of_scattered_blocks(blocks: list[int], first: int | None) -> None:
    table = BlockTable(4)
    table.append(blocks[:1])
    table.append(blocks[1:])
    assert table.first_if_contiguous == first
    expected = [block * 4 + i for block in blocks for i in range(4)]
    assert table.rows(0, table.num_tokens).tolist() == expected
    assert table.rows(2, max(2, table.num_tokens - 1)).tolist() == expected[2:-1]
    assert table.pages(torch.device("cpu")).tolist() == blocks


def test_the_pool_gives_back_what_was_written() -> None:
    shapes = [LayerShape(num_kv_heads=2, k_dim=4, v_dim=6)] * 2
    pool = KVPool(shapes, 3, 4, torch.float32, torch.device("cpu"))
    rows = torch.tensor([9, 2, 11])
    keys, values = torch.randn(3, 2, 4), torch.randn(3, 2, 6)
    pool.write(1, rows, keys, values)
    assert torch.equal(pool.read(1, rows)[0], keys)
    assert torch.equal(pool.read(1, rows)[1], values)
    assert torch.equal(pool.keys[1][2, 1], keys[0])  # row 9 is token 1 of block 2
    assert float(pool.keys[0].abs().sum()) == 0
    values_at_9 = pool.slice(1, 9, 1)[1]
    assert torch.equal(values_at_9[0], values[0])
    values_at_9 += 1
    assert torch.equal(pool.read_values(1, rows[:1])[0], values[0] + 1)
