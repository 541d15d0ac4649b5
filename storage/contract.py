"""Tests that a tier inherits: whoever follows `storage.tier.ChunkTier` brings a fixture and passes them (needs pytest).

class TestMyTier(TierContract):
    @pytest.fixture
    def tier(self): ...                       # empty, with a budget of 128 KiB to a few MiB
    def break_writes(self, tier, monkeypatch): ...

class TestMyDurableTier(PersistentTierContract):
    @pytest.fixture
    def reopen(self): ...                     # reopen(budget_bytes) -> another tier over the same place
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pyarrow as pa
import pytest

from storage.format import ChunkHeader, LayerShape, encode, encoded_size
from storage.header import Buffer, Bytes, CorruptChunk, byte_view
from storage.keys import KeySpace, chain
from storage.layout import KV
from storage.tier import ChunkMissing, ChunkTier, TierError, TierFull

ROOT = KeySpace(model="contract", tokenizer="contract", dtype="float32").root()
NUM_LAYERS = 3


def sample_layers(seed: int, num_bytes: int, num_layers: int = NUM_LAYERS) -> tuple[ChunkHeader, list[KV]]:
    """A chunk of its own for every seed, encoded in roughly (and at most) `num_bytes`, at least some 4 KiB."""
    num_heads, num_tokens = 2, 4
    dim = max(1, (num_bytes - 4096) // (num_layers * 2 * num_heads * num_tokens * 4))
    token_ids = tuple(range(seed, seed + num_tokens))
    marks = tuple(chain(ROOT, token_ids, chunk_tokens=num_tokens, cuts=(2,)))
    shape = LayerShape(num_kv_heads=num_heads, k_dim=dim, v_dim=dim)
    header = ChunkHeader(
        key=marks[-1][1],
        parent=None,
        root=ROOT,
        start=0,
        token_ids=token_ids,
        marks=marks,
        dtype="float32",
        layers=(shape,) * num_layers,
    )
    values = np.random.default_rng(seed)
    size = (num_heads, num_tokens, dim)
    layers = [(values.random(size, dtype=np.float32), values.random(size, dtype=np.float32)) for _ in range(num_layers)]
    return header, layers


def sample_chunk(seed: int, num_bytes: int, num_layers: int = NUM_LAYERS) -> tuple[str, Bytes]:
    """Key and encoded bytes of such a chunk."""
    header, layers = sample_layers(seed, num_bytes, num_layers)
    return header.key, encode(header, layers)


def damaged(data: Bytes, damage: str) -> Bytes:
    """A chunk's bytes, spoilt: head, layer, cut, empty, or another chunk."""
    if damage == "head":
        copy = data.copy()
        copy[200] ^= 1
        return copy
    if damage == "cut":
        return data[:-1]
    if damage == "layer":
        copy = data.copy()
        copy[len(data) // 2] ^= 1
        return copy
    if damage == "empty":
        return data[:0]
    return sample_chunk(999, 0)[1]


def same_bytes(left: Buffer, right: Buffer) -> bool:
    return bool(np.array_equal(byte_view(left), byte_view(right)))


def kept_sizes(tier: ChunkTier) -> dict[str, int]:
    keys = tier.keys()
    return {key: tier.num_bytes(key) for key in keys}


def assert_account_is_true(tier: ChunkTier, chunks: Mapping[str, Bytes]) -> None:
    """What is counted is there, whole, and nothing else is counted."""
    sizes = kept_sizes(tier)
    assert tier.used_bytes == sum(sizes.values())
    assert sizes == {key: len(chunks[key]) for key in sizes}
    for key in sizes:
        assert same_bytes(tier.read(key), chunks[key])


class TierContract:
    """What holds for every tier."""

    @pytest.fixture
    def tier(self) -> Iterator[ChunkTier]:
        raise NotImplementedError("a tier's test class provides the fixture `tier`: an empty tier")

    def break_writes(self, tier: ChunkTier, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on the place under the tier fails in the middle of a write."""
        raise NotImplementedError("a tier's test class says how its writes can fail")

    @staticmethod
    def unit(tier: ChunkTier) -> int:
        """A chunk size of which eight fit the budget, and nine do not."""
        return tier.budget_bytes // 8

    # --- putting and getting ---

    def test_opens_what_was_put(self, tier: ChunkTier) -> None:
        header, layers = sample_layers(1, self.unit(tier))
        tier.put(header.key, encode(header, layers))
        reader = tier.open(header.key)
        assert reader.header == header
        reader.verify()
        for i, (k, v) in enumerate(layers):
            stored_k, stored_v = reader.layer(i)
            assert np.array_equal(stored_k, k)
            assert np.array_equal(stored_v, v)
            assert not stored_k.flags.writeable
            assert not stored_v.flags.writeable
        reader.close()

    def test_counts_real_bytes(self, tier: ChunkTier) -> None:
        assert tier.used_bytes == 0
        sizes = {}
        for seed in range(3):
            key, data = sample_chunk(seed, self.unit(tier) // (seed + 1))
            assert tier.put(key, data) == len(data)
            sizes[key] = len(data)
        assert kept_sizes(tier) == sizes
        assert list(sizes) == tier.keys()
        assert tier.used_bytes == sum(sizes.values())

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, pa.py_buffer, np.asarray])
    def test_takes_any_buffer_and_lends_it_back(self, tier: ChunkTier, kind: Callable[[object], Buffer]) -> None:
        key, data = sample_chunk(2, self.unit(tier))
        tier.put(key, kind(data))
        assert same_bytes(tier.read(key), data)

    def test_keeps_its_own_copy(self, tier: ChunkTier) -> None:
        key, data = sample_chunk(3, self.unit(tier))
        before = data.copy()
        tier.put(key, data)
        data[:] = 0
        assert same_bytes(tier.read(key), before)

    def test_same_key_again_changes_nothing(self, tier: ChunkTier) -> None:
        key, data = sample_chunk(4, self.unit(tier))
        tier.put(key, data)
        assert tier.put(key, data[: len(data) // 2]) == len(data)
        assert tier.used_bytes == len(data)
        assert same_bytes(tier.read(key), data)

    def test_refuses_scattered_bytes(self, tier: ChunkTier) -> None:
        key, data = sample_chunk(5, self.unit(tier))
        with pytest.raises(ValueError, match="contiguous"):
            tier.put(key, np.repeat(data, 2)[::2])
        assert key not in tier
        assert tier.used_bytes == 0

    # --- missing and deleted ---

    def test_a_chunk_never_put_is_missing(self, tier: ChunkTier) -> None:
        key, _ = sample_chunk(6, 0)
        assert key not in tier
        assert None not in tier
        assert not tier.delete(key)
        for call in (tier.open, tier.read, tier.num_bytes):
            with pytest.raises(ChunkMissing):
                call(key)

    def test_delete_frees_the_bytes(self, tier: ChunkTier) -> None:
        key, data = sample_chunk(7, self.unit(tier))
        tier.put(key, data)
        assert key in tier
        assert tier.delete(key)
        assert not tier.delete(key)
        assert key not in tier
        assert tier.keys() == []
        assert tier.used_bytes == 0
        with pytest.raises(ChunkMissing):
            tier.open(key)
        tier.put(key, data)
        assert same_bytes(tier.read(key), data)

    def test_delete_does_not_disturb_a_reader(self, tier: ChunkTier) -> None:
        header, layers = sample_layers(8, self.unit(tier))
        data = encode(header, layers)
        tier.put(header.key, data)
        whole, reader = tier.read(header.key), tier.open(header.key)
        k, _ = reader.layer(0)
        tier.delete(header.key)
        for seed in range(100, 108):  # whatever memory came free is used again
            tier.put(*sample_chunk(seed, self.unit(tier)))
        assert same_bytes(whole, data)
        assert np.array_equal(k, layers[0][0])
        with suppress(ChunkMissing):
            assert np.array_equal(reader.layer(2)[1], layers[2][1])

    # --- budget ---

    def test_full_tier_refuses_and_keeps_nothing(self, tier: ChunkTier) -> None:
        for seed in range(8):
            tier.put(*sample_chunk(seed, self.unit(tier)))
        used, keys = tier.used_bytes, tier.keys()
        key, data = sample_chunk(9, self.unit(tier))
        with pytest.raises(TierFull):
            tier.put(key, data)
        assert key not in tier
        assert (tier.used_bytes, tier.keys()) == (used, keys)
        tier.delete(keys[0])
        tier.put(key, data)

    def test_refuses_more_than_the_whole_budget(self, tier: ChunkTier) -> None:
        key, data = sample_chunk(10, tier.budget_bytes + 8192)
        with pytest.raises(TierFull):
            tier.put(key, data)
        assert tier.used_bytes == 0

    def test_concurrent_puts_stay_within_the_budget(self, tier: ChunkTier) -> None:
        chunks = dict(sample_chunk(seed, self.unit(tier)) for seed in range(0, 160, 10))
        with _watched(tier), ThreadPoolExecutor(8) as pool:
            kept = dict(zip(chunks, pool.map(lambda item: _put_or_full(tier, *item), chunks.items())))
        assert sum(kept.values()) == 8
        assert set(tier.keys()) == {key for key, is_kept in kept.items() if is_kept}
        assert_account_is_true(tier, chunks)

    def test_concurrent_puts_of_one_chunk_count_once(self, tier: ChunkTier) -> None:
        key, data = sample_chunk(11, self.unit(tier) * 5)  # two of them would not fit
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda _: tier.put(key, data), range(8))) == [len(data)] * 8
        assert tier.used_bytes == len(data)

    def test_account_survives_a_tussle(self, tier: ChunkTier) -> None:
        chunks = dict(sample_chunk(seed, self.unit(tier)) for seed in range(0, 120, 10))

        def tussle(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(12):
                key, data = choose.choice(list(chunks.items()))
                action = choose.choice(["put", "put", "delete", "open"])
                if action == "put":
                    _put_or_full(tier, key, data)
                elif action == "delete":
                    tier.delete(key)
                else:
                    with suppress(ChunkMissing):
                        tier.open(key).verify()

        with _watched(tier), ThreadPoolExecutor(4) as pool:
            list(pool.map(tussle, range(4)))
        assert_account_is_true(tier, chunks)
        assert [key for key in chunks if key in tier] == [key for key in chunks if key in set(tier.keys())]

    # --- what goes wrong ---

    def test_failed_write_leaves_nothing(self, tier: ChunkTier, monkeypatch: pytest.MonkeyPatch) -> None:
        tier.put(*sample_chunk(12, self.unit(tier)))
        used, keys = tier.used_bytes, tier.keys()
        key, data = sample_chunk(13, self.unit(tier))
        with monkeypatch.context() as broken:
            self.break_writes(tier, broken)
            with pytest.raises(TierError):
                tier.put(key, data)
        assert key not in tier
        assert (tier.used_bytes, tier.keys()) == (used, keys)
        tier.put(key, data)
        assert same_bytes(tier.read(key), data)

    def test_damaged_layer_is_never_decoded(self, tier: ChunkTier) -> None:
        header, layers = sample_layers(14, self.unit(tier))
        data = encode(header, layers)
        data[len(data) // 2] ^= 1
        tier.put(header.key, data)
        reader = tier.open(header.key)
        with pytest.raises(CorruptChunk):
            reader.layer(NUM_LAYERS // 2)
        with pytest.raises(CorruptChunk):
            reader.verify()
        assert np.array_equal(reader.layer(0)[0], layers[0][0])

    @pytest.mark.parametrize("damage", ["head", "cut", "empty", "other chunk"])
    def test_damaged_chunk_does_not_open(self, tier: ChunkTier, damage: str) -> None:
        key, data = sample_chunk(15, self.unit(tier))
        tier.put(key, damaged(data, damage))
        with pytest.raises(CorruptChunk):
            tier.open(key)

    def test_inventory_lists_headers_and_drops_damage(self, tier: ChunkTier) -> None:
        expected = {}
        for seed in range(20, 60, 10):
            header, layers = sample_layers(seed, self.unit(tier))
            tier.put(header.key, encode(header, layers))
            expected[header.key] = (header, encoded_size(header))
        key, data = sample_chunk(16, self.unit(tier))
        tier.put(key, damaged(data, "head"))
        assert {header.key: (header, size) for header, size in tier.inventory()} == expected
        assert key not in tier
        assert set(tier.keys()) == set(expected)
        assert tier.used_bytes == sum(size for _, size in expected.values())


class PersistentTierContract(TierContract):
    """What holds in addition for a tier whose chunks outlive the process, and which others may share."""

    @pytest.fixture
    def reopen(self) -> Callable[[int], ChunkTier]:
        raise NotImplementedError("a persistent tier's test class provides `reopen(budget_bytes)`, over the same place")

    def test_restart_finds_everything(self, tier: ChunkTier, reopen: Callable[[int], ChunkTier]) -> None:
        chunks = dict(sample_chunk(seed, self.unit(tier)) for seed in range(3))
        for key, data in chunks.items():
            tier.put(key, data)
        listed = {header.key: size for header, size in tier.inventory()}
        tier.close()
        again = reopen(tier.budget_bytes)
        assert again.used_bytes == sum(len(data) for data in chunks.values())
        assert {header.key: size for header, size in again.inventory()} == listed
        for key, data in chunks.items():
            assert same_bytes(again.read(key), data)

    def test_restart_with_a_smaller_budget_stays_below_it(
        self, tier: ChunkTier, reopen: Callable[[int], ChunkTier]
    ) -> None:
        for seed in range(6):
            tier.put(*sample_chunk(seed, self.unit(tier)))
        tier.close()
        again = reopen(tier.budget_bytes // 2)
        assert 0 < again.used_bytes <= again.budget_bytes
        assert again.used_bytes == sum(kept_sizes(again).values())

    def test_finds_what_a_neighbour_put(self, tier: ChunkTier, reopen: Callable[[int], ChunkTier]) -> None:
        neighbour = reopen(tier.budget_bytes)
        key, data = sample_chunk(17, self.unit(tier))
        neighbour.put(key, data)
        assert key in tier
        assert tier.num_bytes(key) == len(data)
        assert same_bytes(tier.read(key), data)
        tier.open(key).verify()
        assert (tier.used_bytes, tier.keys()) == (0, [])
        tier.put(key, data)
        assert (tier.used_bytes, tier.keys()) == (len(data), [key])

    def test_notices_what_a_neighbour_deleted(self, tier: ChunkTier, reopen: Callable[[int], ChunkTier]) -> None:
        neighbour = reopen(tier.budget_bytes)
        key, data = sample_chunk(18, self.unit(tier))
        tier.put(key, data)
        assert neighbour.delete(key)
        with pytest.raises(ChunkMissing):
            tier.read(key)
        assert (tier.used_bytes, tier.keys()) == (0, [])
        tier.put(key, data)
        assert neighbour.delete(key)
        assert tier.put(key, data) == len(data)  # unnoticed in between: it is written again
        assert same_bytes(tier.read(key), data)
        assert tier.used_bytes == len(data)


def _put_or_full(tier: ChunkTier, key: str, data: Bytes) -> bool:
    try:
        tier.put(key, data)
    except TierFull:
        return False
    return True


@contextmanager
def _watched(tier: ChunkTier) -> Iterator[None]:
    """Look at the account all the time while the block runs."""
    stop = threading.Event()
    highest = 0

    def watch() -> None:
        nonlocal highest
        while not stop.is_set():
            highest = max(highest, tier.used_bytes)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        highest = max(highest, tier.used_bytes)  # it may all have been over before the watcher looked
    assert 0 < highest <= tier.budget_bytes
