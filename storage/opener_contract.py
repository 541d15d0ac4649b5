"""Tests that an opener inherits: who only reads what a tier keeps (needs pytest; `storage.contract` has the tiers').

class TestMyReader(OpenerContract):           # for a `storage.tier.ChunkOpener`
    @pytest.fixture
    def tier(self): ...                       # a tier whose chunks the opener reads
    @pytest.fixture
    def opener(self, tier): ...
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from storage.contract import NUM_LAYERS, damaged, sample_chunk, sample_layers
from storage.format import encode
from storage.header import CorruptChunk
from storage.tier import ChunkMissing, ChunkOpener, ChunkTier, TierError


class OpenerContract:
    """What holds for every opener, hints or no hints."""

    @pytest.fixture
    def tier(self) -> Iterator[ChunkTier]:
        raise NotImplementedError("an opener's test class provides the fixture `tier`: an empty tier, which it reads")

    @pytest.fixture
    def opener(self, tier: ChunkTier) -> ChunkOpener:
        raise NotImplementedError("an opener's test class provides the fixture `opener`: it reads what `tier` keeps")

    @pytest.mark.parametrize("hint", ["none", "size", "prefetch", "prefetch twice", "prefetch and forget"])
    def test_opens_what_the_tier_keeps(self, tier: ChunkTier, opener: ChunkOpener, hint: str) -> None:
        header, layers = sample_layers(1, 200_000)
        num_bytes = tier.put(header.key, encode(header, layers))
        for _ in range({"prefetch": 1, "prefetch twice": 2, "prefetch and forget": 1}.get(hint, 0)):
            opener.prefetch(header.key, num_bytes)
        if hint == "prefetch and forget":
            opener.forget(header.key)
        reader = opener.open(header.key, None if hint == "none" else num_bytes)
        assert reader.header == header
        assert reader.num_bytes == num_bytes
        reader.verify()
        for i, (k, v) in enumerate(layers):
            assert np.array_equal(reader.layer(i)[0], k)
            assert np.array_equal(reader.layer(i)[1], v)
        k, _ = reader.layer(1)
        reader.close()
        assert np.array_equal(k, layers[1][0])

    def test_a_hint_without_a_size_is_enough(self, tier: ChunkTier, opener: ChunkOpener) -> None:
        key, data = sample_chunk(2, 200_000)
        tier.put(key, data)
        opener.prefetch(key, len(data))
        opener.open(key).verify()

    def test_many_at_once_from_many_threads(self, tier: ChunkTier, opener: ChunkOpener) -> None:
        chunks = dict(sample_chunk(seed, 20_000) for seed in range(0, 80, 10))
        for key, data in chunks.items():
            tier.put(key, data)

        def use(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(20):
                key, data = choose.choice(list(chunks.items()))
                for action in choose.sample(["prefetch", "prefetch", "open", "forget"], 3):
                    if action == "prefetch":
                        opener.prefetch(key, len(data))
                    elif action == "open":
                        opener.open(key, len(data))
                    else:
                        opener.forget(key)
                opener.open(key, len(data)).verify()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))

    @pytest.mark.parametrize("is_prefetched", [False, True])
    def test_a_missing_chunk(self, opener: ChunkOpener, is_prefetched: bool) -> None:
        key, data = sample_chunk(3, 20_000)
        if is_prefetched:
            opener.prefetch(key, len(data))  # does not raise
        for num_bytes in (len(data), None):
            with pytest.raises(ChunkMissing):
                opener.open(key, num_bytes)
        opener.forget(key)

    @pytest.mark.parametrize("is_prefetched", [False, True])
    @pytest.mark.parametrize("damage", ["head", "cut", "empty", "other chunk", "layer"])
    def test_damage_is_seen(self, tier: ChunkTier, opener: ChunkOpener, damage: str, is_prefetched: bool) -> None:
        key, data = sample_chunk(4, 200_000)
        tier.put(key, damaged(data, damage))
        if is_prefetched:
            opener.prefetch(key, len(data))
        # of an object without bytes some places refuse to send a range
        with pytest.raises((CorruptChunk, TierError) if damage == "empty" else CorruptChunk):
            opener.open(key, len(data)).layer(NUM_LAYERS // 2)

    @pytest.mark.parametrize("is_prefetched", [False, True])
    @pytest.mark.parametrize("error", [-64, 64])
    def test_a_chunk_of_another_size_is_corrupt(
        self, tier: ChunkTier, opener: ChunkOpener, error: int, is_prefetched: bool
    ) -> None:
        key, data = sample_chunk(5, 200_000)
        tier.put(key, data)
        if is_prefetched:
            opener.prefetch(key, len(data) + error)
        with pytest.raises(CorruptChunk):
            opener.open(key, len(data) + error)

    def test_a_failure_is_not_remembered(self, tier: ChunkTier, opener: ChunkOpener) -> None:
        key, data = sample_chunk(6, 20_000)
        opener.prefetch(key, len(data))
        with pytest.raises(ChunkMissing):
            opener.open(key, len(data))
        tier.put(key, data)
        opener.open(key, len(data)).verify()
