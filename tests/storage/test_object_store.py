from __future__ import annotations

import gc
import time

import numpy as np
import pytest
import ray

import storage.object_store
from storage.contract import TierContract, same_bytes, sample_chunk, sample_layers
from storage.format import CorruptChunk, encode
from storage.object_store import SAFE_SHARE, ObjectStoreStats, RayTier
from storage.parts import whole
from storage.tier import ChunkMissing, TierError, TierFull

pytestmark = pytest.mark.usefixtures("local_ray")

BUDGET = 2 << 20


@ray.remote(num_cpus=0, max_task_retries=0)
class Shard:
    """Stands for an engine: returns chunks to whoever calls, who then owns them."""

    def export(self, seed, num_bytes):
        return sample_chunk(seed, num_bytes)[1]

    def export_parked(self, seed, num_bytes):
        """Owned by this actor, and lost with it."""
        return [ray.put(sample_chunk(seed, num_bytes)[1])]

    def fail(self):
        raise RuntimeError("no such chunk")

    def sleep(self, seconds):
        time.sleep(seconds)
        return np.zeros(10, dtype=np.uint8)

    def checksum(self, boxed):
        return int(whole(ray.get(boxed[0])).astype(np.int64).sum())


@pytest.fixture
def shard():
    actor = Shard.remote()
    yield actor
    ray.kill(actor)


class TestRayTier(TierContract):
    @pytest.fixture
    def tier(self):
        tier = RayTier(BUDGET)
        yield tier
        tier.close()

    def break_writes(self, tier, monkeypatch):
        def full(value):
            raise ray.exceptions.ObjectStoreFullError("no space")

        monkeypatch.setattr(storage.object_store.ray, "put", full)

    def test_adopts_what_a_shard_exports_and_keeps_it_when_the_shard_dies(self, tier, shard):
        key, data = sample_chunk(1, 200_000)
        tier.reserve(len(data))
        assert tier.used_bytes == len(data)
        ref = shard.export.remote(1, 200_000)
        assert tier.adopt(key, ref, len(data))
        assert tier.used_bytes == len(data)
        assert same_bytes(tier.read(key), data)
        del ref
        ray.kill(shard)
        tier.open(key).verify()

    def test_adopting_twice_counts_once(self, tier, shard):
        key, data = sample_chunk(2, 200_000)
        tier.put(key, data)
        tier.reserve(len(data))
        assert not tier.adopt(key, shard.export.remote(2, 200_000), len(data))
        assert tier.used_bytes == len(data)

    def test_a_reservation_can_be_given_back(self, tier):
        tier.reserve(BUDGET)
        with pytest.raises(TierFull):
            tier.reserve(1)
        with pytest.raises(TierFull):
            tier.put(*sample_chunk(3, 200_000))
        tier.release(BUDGET)
        assert tier.used_bytes == 0
        tier.put(*sample_chunk(3, 200_000))

    def test_an_object_lost_with_its_owner_is_missing(self, tier, shard):
        key, data = sample_chunk(4, 200_000)
        (ref,) = ray.get(shard.export_parked.remote(4, 200_000))
        tier.reserve(len(data))
        tier.adopt(key, ref, len(data))
        ray.kill(shard)
        time.sleep(0.5)
        with pytest.raises(ChunkMissing, match="lost"):
            tier.read(key)
        assert key not in tier
        assert tier.used_bytes == 0

    def test_an_export_that_failed_is_missing(self, tier, shard):
        tier.reserve(100)
        tier.adopt("failed", shard.fail.remote(), 100)
        with pytest.raises(ChunkMissing, match="no such chunk"):
            tier.open("failed")
        assert tier.used_bytes == 0

    def test_an_export_that_does_not_come_ends_at_the_deadline(self, tier, shard):
        tier.deadline_s = 0.2
        tier.reserve(100)
        tier.adopt("late", shard.sleep.remote(1.0), 100)
        with pytest.raises(TierError, match=r"within 0\.2 s"):
            tier.read("late")
        assert "late" in tier
        tier.deadline_s = 30.0
        assert len(tier.read("late")) == 10

    def test_an_object_that_holds_no_bytes_is_corrupt(self, tier):
        tier.reserve(100)
        tier.adopt("words", ray.put("words"), 100)
        with pytest.raises(CorruptChunk):
            tier.open("words")

    def test_reads_are_shared_memory_and_read_only(self, tier):
        header, layers = sample_layers(5, 1_000_000)
        tier.put(header.key, encode(header, layers))
        k, _ = tier.open(header.key).layer(1)
        assert np.shares_memory(k, whole(ray.get(tier.ref(header.key))))
        assert not tier.read(header.key).flags.writeable

    def test_a_reference_can_be_read_elsewhere(self, tier, shard):
        key, data = sample_chunk(6, 200_000)
        tier.put(key, data)
        assert ray.get(shard.checksum.remote([tier.ref(key)])) == int(data.astype(np.int64).sum())
        tier.delete(key)
        with pytest.raises(ChunkMissing):
            tier.ref(key)

    @pytest.mark.parametrize("error", [ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError])
    def test_a_full_object_store_is_a_full_tier(self, tier, monkeypatch, error):
        def full(value):
            raise error("full")

        monkeypatch.setattr(storage.object_store.ray, "put", full)
        with pytest.raises(TierFull, match="lower the budget"):
            tier.put(*sample_chunk(7, 20_000))
        assert tier.used_bytes == 0


def test_a_budget_beyond_the_safe_share_is_refused():
    capacity = ObjectStoreStats().capacity_bytes
    with pytest.raises(ValueError, match="object_store_memory"):
        RayTier(int(capacity * SAFE_SHARE) + 1)
    assert RayTier(int(capacity * SAFE_SHARE) + 1, max_share=0.9).used_bytes == 0


@pytest.fixture
def stats():
    stats = ObjectStoreStats()
    yield stats
    stats.close()


class TestObjectStoreStats:
    def test_sees_what_a_tier_puts_and_frees(self, stats):
        tier = RayTier(64 << 20)
        before = stats.usage()
        key, data = sample_chunk(8, 20 << 20)
        tier.put(key, data)
        assert wait_until(lambda: stats.usage().used_bytes - before.used_bytes >= len(data))
        assert stats.usage().used_bytes - before.used_bytes < len(data) + 64 * 1024
        assert stats.usage().fallback_bytes == before.fallback_bytes
        assert stats.usage().spilled_bytes == before.spilled_bytes
        tier.delete(key)
        gc.collect()
        assert wait_until(lambda: stats.usage().used_bytes <= before.used_bytes)

    def test_a_live_view_keeps_its_bytes(self, stats):
        tier = RayTier(64 << 20)
        key, data = sample_chunk(9, 20 << 20)
        tier.put(key, data)
        k, _ = tier.open(key).layer(0)
        tier.delete(key)
        time.sleep(0.3)
        assert stats.usage().used_bytes >= len(data)
        assert k.any()
        stats.close()
        assert stats.usage() is not None  # connects again

    def test_knows_the_size_of_the_store(self):
        assert 0 < ObjectStoreStats().capacity_bytes <= ray.cluster_resources()["object_store_memory"]

    def test_without_the_private_interface_there_are_no_figures(self, stats, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "ray._private.grpc_utils", None)
        assert stats.usage() is None

    def test_a_raylet_that_does_not_answer_gives_no_figures(self, stats, monkeypatch):
        monkeypatch.setitem(stats._node, "NodeManagerPort", 9)
        assert stats.usage() is None


def wait_until(condition, timeout_s=5.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False
