from __future__ import annotations

import gc
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from storage.bucket import BucketReader, ObjectTier
from storage.contract import NUM_LAYERS, PersistentTierContract, same_bytes, sample_chunk, sample_layers
from storage.filesystem import open_tier
from storage.format import FIRST_READ_BYTES, encode
from storage.opener_contract import OpenerContract
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


@pytest.fixture
def bucket(s3_server):
    """An empty bucket of its own for every test."""
    name = f"bucket-{uuid.uuid4().hex}"
    s3_server.delay_s, s3_server.refuse = 0.0, frozenset()
    fsspec.filesystem("s3", endpoint_url=s3_server.url).mkdir(name)
    s3_server.requests.clear()
    yield name
    s3_server.delay_s, s3_server.refuse = 0.0, frozenset()


class TestS3(PersistentTierContract):
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
        assert reopen(1).read(key) == data.tobytes()  # not in this one's account: its size is unknown
        assert [method for method, _, _ in self.server.requests] == ["GET"] * 2

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


class TestMemoryReader(OpenerContract):
    @pytest.fixture
    def tier(self):
        yield ObjectTier("memory://openers", 10 << 20)
        memory = fsspec.filesystem("memory")
        if memory.exists("/openers"):
            memory.rm("/openers", recursive=True)

    @pytest.fixture
    def opener(self, tier):
        return BucketReader("memory://openers")

    def test_prefetch_does_not_wait_and_a_hang_ends_at_the_deadline(self, tier, monkeypatch):
        key, data = sample_chunk(1, 20_000)
        tier.put(key, data)
        reader = BucketReader("memory://openers", deadline_s=0.2)
        monkeypatch.setattr(reader._bucket._fs, "cat_file", lambda *args, **kwargs: time.sleep(1.0))
        started = time.monotonic()
        reader.prefetch(key, len(data))
        assert time.monotonic() - started < 0.1
        with pytest.raises(TierError, match=r"not done after 0\.2 s"):
            reader.open(key, len(data))
        assert time.monotonic() - started < 0.9


class TestS3Reader(OpenerContract):
    DELAY_S = 0.02

    @pytest.fixture
    def tier(self, bucket, s3_server):
        return open_tier(f"s3://{bucket}/chunks", 10 << 20, options={"endpoint_url": s3_server.url})

    @pytest.fixture
    def make(self, bucket, s3_server):
        """A reader of the bucket, with other settings."""
        return lambda **settings: BucketReader(
            f"s3://{bucket}/chunks", options={"endpoint_url": s3_server.url}, **settings
        )

    @pytest.fixture
    def opener(self, tier, make, s3_server):
        s3_server.requests.clear()
        return make()

    def put_turn(self, tier, server, num_chunks=8, num_layers=NUM_LAYERS):
        """The chunks of a turn, larger than what comes with a head; then the network gets slow."""
        chunks = dict(sample_chunk(seed, LARGE, num_layers) for seed in range(num_chunks))
        for key, data in chunks.items():
            tier.put(key, data)
        open_and_verify(tier, next(iter(chunks)))  # connections are there
        server.requests.clear()
        server.delay_s, server.most_at_once = self.DELAY_S, 0
        return chunks

    @pytest.mark.parametrize("num_layers", [2, 28])
    @pytest.mark.parametrize("is_prefetched", [False, True])
    def test_one_get_per_chunk_and_no_head_however_many_layers(self, tier, make, s3_server, num_layers, is_prefetched):
        chunks = self.put_turn(tier, s3_server, 4, num_layers)
        reader = make()
        for key, data in chunks.items() if is_prefetched else ():
            reader.prefetch(key, len(data))
        for key, data in chunks.items():
            chunk = reader.open(key, len(data))
            assert len(chunk.header.layers) == num_layers
            chunk.verify()
        ranges = [f"bytes=0-{len(data) - 1}" for data in chunks.values()]
        assert sorted(s3_server.requests_of("GET")) == sorted(ranges)
        assert {method for method, _, _ in s3_server.requests} == {"GET"}

    def test_prefetched_chunks_come_together(self, tier, make, s3_server):
        chunks = self.put_turn(tier, s3_server)
        s3_server.delay_s = 0.3
        reader = make()
        started = time.monotonic()
        for key, data in chunks.items():
            reader.prefetch(key, len(data))
        assert time.monotonic() - started < s3_server.delay_s  # it does not wait
        for key, data in chunks.items():
            reader.open(key, len(data))
        assert time.monotonic() - started < 4 * s3_server.delay_s  # one after the other: eight and more
        assert len(s3_server.requests) == len(chunks)
        assert s3_server.most_at_once >= 6

    @pytest.mark.parametrize("is_prefetched", [False, True])
    def test_those_who_want_a_chunk_at_the_same_time_share_one_get(self, tier, make, s3_server, is_prefetched):
        [(key, data)] = self.put_turn(tier, s3_server, 1).items()
        s3_server.delay_s = 0.2
        reader = make()

        def restore(_):
            if is_prefetched:
                reader.prefetch(key, len(data))
            chunk = reader.open(key, len(data))
            chunk.verify()
            return chunk

        with ThreadPoolExecutor(4) as pool:
            readers = list(pool.map(restore, range(4)))
        assert len(s3_server.requests) == 1
        reader.open(key, len(data)).verify()  # while others are reading it
        assert len(s3_server.requests) == 1
        del readers
        gc.collect()
        reader.open(key, len(data)).verify()
        assert len(s3_server.requests) == 2

    def test_forgotten_is_not_kept(self, tier, make, s3_server):
        [(key, data)] = self.put_turn(tier, s3_server, 1).items()
        reader = make()
        reader.prefetch(key, len(data))
        wait_until(lambda: len(s3_server.requests) == 1)
        reader.forget(key)
        assert reader._arrivals.expected_bytes == 0
        reader.open(key, len(data)).verify()
        assert len(s3_server.requests) == 2

    def test_prefetched_memory_is_bounded(self, tier, make, s3_server):
        chunks = self.put_turn(tier, s3_server)
        reader = make(prefetch_bytes=2 * LARGE)
        for key, data in chunks.items():
            reader.prefetch(key, len(data))
            assert reader._arrivals.expected_bytes <= 2 * LARGE
        time.sleep(0.2)
        assert len(s3_server.requests) == 2
        for key, data in chunks.items():
            reader.open(key, len(data)).verify()
        assert len(s3_server.requests) == len(chunks)  # none was fetched in vain
        assert reader._arrivals.expected_bytes == 0

    def test_a_silent_server_ends_at_the_deadline(self, tier, make, s3_server):
        [(key, data)] = self.put_turn(tier, s3_server, 1).items()
        reader = make(deadline_s=0.6)
        s3_server.delay_s = 1.5
        reader.prefetch(key, len(data))
        time.sleep(0.4)
        started = time.monotonic()
        with pytest.raises(TierError, match="not done after"):
            reader.open(key, len(data))
        assert time.monotonic() - started < 0.5  # the deadline began with the request
        s3_server.delay_s = 0.0
        reader.open(key, len(data)).verify()
        time.sleep(1.2)  # let the server finish what it was asked

    def test_denied_is_told_when_it_is_opened(self, tier, make, s3_server):
        [(key, data)] = self.put_turn(tier, s3_server, 1).items()
        reader = make()
        s3_server.refuse = frozenset({"GET"})
        reader.prefetch(key, len(data))
        with pytest.raises(TierError, match="credentials"):
            reader.open(key, len(data))


def open_and_verify(tier, key):
    tier.open(key).verify()


def wait_until(is_true, limit_s=5.0):
    ends_at = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < ends_at
        time.sleep(0.005)


def range_length(asked):
    first, last = asked.removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_chunk_that_vanishes_before_its_put_is_ours_to_count_is_written():
    tier = ObjectTier("memory://vanishing/chunks", 1 << 24)
    key, data = sample_chunk(3, 20_000)
    tier.put(key, data)
    ask = tier._bucket.size

    def ask_and_lose(wanted):
        size = ask(wanted)
        tier._bucket.size = ask
        tier.delete(key)
        return size

    tier._bucket.size = ask_and_lose
    assert tier.put(key, data) == len(data)
    assert same_bytes(tier.read(key), data)
    assert tier.used_bytes == len(data)


def test_a_deadline_must_be_positive():
    with pytest.raises(ValueError, match="deadline_s"):
        ObjectTier("memory://x", BUDGET, deadline_s=0)
