from __future__ import annotations

import time
import uuid

import fsspec
import numpy as np
import pytest

from storage.bucket import ObjectTier
from storage.contract import NUM_LAYERS, PersistentTierContract, sample_chunk, sample_layers
from storage.filesystem import open_tier
from storage.format import FIRST_READ_BYTES, encode
from storage.tier import ChunkMissing, TierError, TierFull

BUDGET = 256 * 1024
LARGE = 400_000  # bytes: its layers do not come with the head


class TestMemoryUrl(PersistentTierContract):
    @pytest.fixture
    def reopen(self):
        yield lambda budget_bytes: ObjectTier("memory://contract/chunks", budget_bytes)
        memory = fsspec.filesystem("memory")
        if memory.exists("/contract"):
            memory.rm("/contract", recursive=True)

    @pytest.fixture
    def tier(self, reopen):
        return reopen(BUDGET)

    def break_writes(self, tier, monkeypatch):
        pipe_file = tier._bucket._fs.pipe_file

        def half(path, data):
            pipe_file(path, data[: len(data) // 2])
            raise OSError(28, "no space left on device")

        monkeypatch.setattr(tier._bucket._fs, "pipe_file", half)

    def test_a_full_device_is_a_full_tier(self, tier, monkeypatch):
        self.break_writes(tier, monkeypatch)
        with pytest.raises(TierFull, match="no space"):
            tier.put(*sample_chunk(1, 20_000))

    def test_a_call_that_hangs_ends_at_the_deadline(self, tier, monkeypatch):
        key, data = sample_chunk(2, 20_000)
        tier.put(key, data)
        tier._bucket.deadline_s = 0.2
        for operation in ("cat_file", "info", "pipe_file", "rm_file"):
            monkeypatch.setattr(tier._bucket._fs, operation, lambda *args, **kwargs: time.sleep(1.0))
        started = time.monotonic()
        for call in (lambda: tier.open(key), lambda: tier.put("ab", b"x"), lambda: tier.delete(key)):
            with pytest.raises(TierError, match=r"not done after 0\.2 s"):
                call()
        assert time.monotonic() - started < 0.9
        assert tier.used_bytes == len(data)

    def test_whatever_a_driver_raises_is_a_tier_error(self, tier, monkeypatch):
        key, data = sample_chunk(3, 20_000)
        tier.put(key, data)
        for error in (RuntimeError("driver bug"), KeyError("x"), ConnectionResetError(104, "reset")):
            monkeypatch.setattr(tier._bucket._fs, "cat_file", raising(error))
            with pytest.raises(TierError):
                tier.open(key)
        assert key in tier

    def test_inventory_of_many_skips_the_unreadable(self, tier, monkeypatch):
        big = ObjectTier("memory://contract/many", 10 << 20)
        keys = []
        for seed in range(0, 400, 4):
            key, data = sample_chunk(seed, 0)
            big.put(key, data)
            keys.append(key)
        cat_file = big._bucket._fs.cat_file

        def partly(path, *args, **kwargs):
            if keys[70] in path:
                raise ConnectionResetError(104, "reset")
            return cat_file(path, *args, **kwargs)

        monkeypatch.setattr(big._bucket._fs, "cat_file", partly)
        assert [header.key for header, _ in big.inventory()] == keys[:70] + keys[71:]
        assert keys[70] in big.keys()  # noqa: SIM118 - skipped, not forgotten
        big._bucket._fs.rm("/contract/many", recursive=True)


class TestS3(PersistentTierContract):
    @pytest.fixture
    def bucket(self, s3_server):
        """An empty bucket of its own for every test."""
        name = f"bucket-{uuid.uuid4().hex}"
        s3_server.delay_s, s3_server.refuse = 0.0, frozenset()
        fsspec.filesystem("s3", endpoint_url=s3_server.url).mkdir(name)
        s3_server.requests.clear()
        yield name
        s3_server.delay_s, s3_server.refuse = 0.0, frozenset()

    @pytest.fixture
    def reopen(self, bucket, s3_server):
        def reopen(budget_bytes, **options):
            options = {"deadline_s": 20.0, **options}
            return open_tier(f"s3://{bucket}/chunks", budget_bytes, options={"endpoint_url": s3_server.url}, **options)

        return reopen

    @pytest.fixture
    def tier(self, reopen):
        return reopen(BUDGET)

    @pytest.fixture(autouse=True)
    def remember_server(self, s3_server):
        self.server = s3_server

    def break_writes(self, tier, monkeypatch):
        monkeypatch.setattr(self.server, "refuse", frozenset({"PUT"}))

    def test_one_put_for_a_chunk(self, reopen):
        key, data = sample_chunk(1, LARGE)
        reopen(1 << 20).put(key, data)
        assert len(self.server.requests_of("PUT")) == 1
        assert {method for method, _, _ in self.server.requests} == {"HEAD", "PUT"}  # HEAD: a neighbour's is found

    def test_one_ranged_get_for_the_head_and_one_per_layer(self, reopen):
        header, layers = sample_layers(2, LARGE)
        data = encode(header, layers)
        tier = reopen(1 << 20)
        tier.put(header.key, data)
        self.server.requests.clear()
        reader = tier.open(header.key)
        assert self.server.requests_of("GET") == [f"bytes=0-{FIRST_READ_BYTES - 1}"]
        for i in (2, 1):  # any layer, in any order
            assert np.array_equal(reader.layer(i)[0], layers[i][0])
        reader.layer(0)
        assert [method for method, _, _ in self.server.requests] == ["GET"] * (1 + NUM_LAYERS)
        fetched = sum(range_length(asked) for asked in self.server.requests_of("GET"))
        assert fetched < len(data) + FIRST_READ_BYTES

    def test_a_small_chunk_comes_with_its_head(self, tier):
        key, data = sample_chunk(3, 20_000)
        tier.put(key, data)
        self.server.requests.clear()
        tier.open(key).verify()
        assert [method for method, _, _ in self.server.requests] == ["GET"]

    def test_one_get_for_the_whole_chunk(self, reopen):
        key, data = sample_chunk(4, LARGE)
        tier = reopen(1 << 20)
        tier.put(key, data)
        self.server.requests.clear()
        assert tier.read(key) == data.tobytes()
        assert self.server.requests_of("GET") == [f"bytes=0-{len(data) - 1}"]

    def test_a_silent_server_ends_at_the_deadline(self, reopen):
        tier = reopen(1 << 20, deadline_s=0.3)
        key, data = sample_chunk(5, LARGE)
        tier.put(key, data)
        reader = tier.open(key)
        self.server.delay_s = 1.2
        for call in (lambda: reader.layer(1), lambda: tier.read(key), lambda: tier.put("abc", b"x")):
            started = time.monotonic()
            with pytest.raises(TierError, match="not done after"):
                call()
            assert time.monotonic() - started < 1.0
        assert tier.used_bytes == len(data)
        time.sleep(1.2)  # let the server finish what it was asked

    def test_an_object_that_vanishes_while_it_is_read(self, reopen):
        tier = reopen(1 << 20)
        key, data = sample_chunk(6, LARGE)
        tier.put(key, data)
        reader = tier.open(key)
        reopen(1 << 20).delete(key)
        with pytest.raises(ChunkMissing):
            reader.layer(1)
        assert tier.used_bytes == 0

    def test_trusts_no_listing(self, reopen, bucket):
        key, data = sample_chunk(9, 0)
        other_key = key[:2] + "other"
        tier = reopen(1 << 20)
        tier.put(key, data)
        tier._bucket._fs.ls(f"{bucket}/chunks/{key[:2]}")
        elsewhere = {"endpoint_url": self.server.url, "skip_instance_cache": True}
        fsspec.filesystem("s3", **elsewhere).pipe_file(f"{bucket}/chunks/{key[:2]}/{other_key}.arrow", b"new")
        assert other_key in tier

    def test_denied_says_what_to_check(self, tier):
        self.server.refuse = frozenset({"PUT"})
        with pytest.raises(TierError, match="credentials"):
            tier.put(*sample_chunk(7, 20_000))

    def test_a_bucket_that_is_not_there(self, s3_server):
        tier = open_tier("s3://no-such-bucket/x", BUDGET, options={"endpoint_url": s3_server.url})
        with pytest.raises(TierError, match="create the bucket"):
            tier.put(*sample_chunk(8, 20_000))

    def test_nobody_listens(self):
        with pytest.raises(TierError):
            open_tier("s3://bucket/x", BUDGET, deadline_s=1.0, options={"endpoint_url": "http://127.0.0.1:9"})


def range_length(asked):
    first, last = asked.removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_deadline_must_be_positive():
    with pytest.raises(ValueError, match="deadline_s"):
        ObjectTier("memory://x", BUDGET, deadline_s=0)
