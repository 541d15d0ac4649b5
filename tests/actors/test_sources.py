from __future__ import annotations

import numpy as np
import pytest
import ray

import actors.sources
from actors.sources import restore_sources
from policies import messages as m
from storage.contract import sample_chunk
from storage.format import read_chunk


class FakeOpener:
    """Notes what it is asked."""

    def __init__(self):
        self.calls = []

    def open(self, key, num_bytes=None):
        self.calls.append(("open", key, num_bytes))
        return read_chunk(sample_chunk(1, 0)[1])

    def prefetch(self, key, num_bytes):
        self.calls.append(("prefetch", key, num_bytes))

    def forget(self, key):
        self.calls.append(("forget", key))


def step(tier, key="k", start=0, num_bytes=1000):
    return m.RestoreStep(chunk=key, start=start, num_tokens=4, num_bytes=num_bytes, tier=tier, node_id="n")


@pytest.mark.parametrize("tier", [m.Tier.SSD, m.Tier.OBJECT])
def test_below_dram_the_reader_is_told_the_size(tier):
    opener = FakeOpener()
    [source] = restore_sources([step(tier, start=8)], list, {tier: opener}, 1.0)
    assert (source.key, source.start, source.num_tokens, source.num_bytes) == ("k", 8, 4, 1000)
    assert source.place == tier
    assert source.buffered == (tier == m.Tier.OBJECT)
    source.prefetch()
    source.open()
    assert opener.calls == [("prefetch", "k", 1000), ("open", "k", 1000)]


def test_forgets_only_what_it_prefetched_and_did_not_open():
    opener = FakeOpener()
    opened, prefetched, neither = restore_sources(
        [step(m.Tier.OBJECT, key) for key in "abc"], list, {m.Tier.OBJECT: opener}, 1.0
    )
    opened.prefetch()
    opened.open()
    prefetched.prefetch()
    prefetched.prefetch()
    opener.calls.clear()
    for source in (opened, prefetched, neither):
        source.forget()
        source.forget()
    assert opener.calls == [("forget", "b")]


@pytest.mark.usefixtures("local_ray")
class TestInDram:
    def test_all_objects_of_a_turn_are_asked_for_together(self, monkeypatch):
        chunks = [sample_chunk(seed, 20_000) for seed in range(3)]
        refs = [ray.put(data) for _, data in chunks]
        steps = [step(m.Tier.DRAM, key) for key, _ in chunks]
        asked, got, checkouts = [], [], []

        monkeypatch.setattr(actors.sources.ray, "wait", recorded(ray.wait, asked))
        monkeypatch.setattr(actors.sources.ray, "get", recorded(ray.get, got))
        sources = restore_sources(steps, recorded(lambda: refs, checkouts), {}, 1.0)
        assert asked == checkouts == []
        for source in sources:
            source.prefetch()
        [(wanted, options)] = asked
        assert wanted == refs
        assert options == {"num_returns": 3, "timeout": 0, "fetch_local": True}
        for source, (key, data) in zip(sources, chunks):
            reader = source.open()
            assert reader.header.key == key
            assert np.array_equal(reader.layer(1)[0], read_chunk(data).layer(1)[0])
        assert [wanted for wanted, _ in got] == [refs]
        assert len(checkouts) == 1

    def test_what_is_here_does_not_wait_for_what_is_not(self):
        key, data = sample_chunk(1, 20_000)
        refs = [ray.put(data), late_object()]
        here, missing = restore_sources([step(m.Tier.DRAM, key), step(m.Tier.DRAM)], lambda: refs, {}, 0.2)
        for source in (here, missing):
            source.prefetch()
        assert here.open().header.key == key
        with pytest.raises(ray.exceptions.GetTimeoutError):
            missing.open()
        for source in (here, missing):
            source.forget()
        assert here.open().header.key == key
        ray.cancel(refs[1], force=True)

    def test_one_that_is_lost_costs_the_others_nothing(self):
        @ray.remote(num_cpus=0)
        def broken():
            raise OSError("the disk is gone")

        key, data = sample_chunk(1, 20_000)
        refs = [ray.put(data), broken.remote()]
        ray.wait(refs, num_returns=2)
        here, lost = restore_sources([step(m.Tier.DRAM, key), step(m.Tier.DRAM)], lambda: refs, {}, 1.0)
        for source in (here, lost):
            source.prefetch()
        assert here.open().header.key == key
        with pytest.raises(ray.exceptions.RayTaskError):
            lost.open()

    def test_an_object_that_does_not_come_ends_at_the_deadline(self):
        ref = late_object()
        [source] = restore_sources([step(m.Tier.DRAM)], lambda: [ref], {}, 0.2)
        source.prefetch()  # does not wait
        with pytest.raises(ray.exceptions.GetTimeoutError):
            source.open()
        ray.cancel(ref, force=True)

    def test_an_object_that_is_gone_is_told_when_it_is_opened(self):
        key, data = sample_chunk(1, 20_000)
        refs = [ray.put(data), None]
        present, gone = restore_sources([step(m.Tier.DRAM), step(m.Tier.DRAM)], lambda: refs, {}, 1.0)
        gone.prefetch()
        assert present.open().header.key == key
        with pytest.raises(ValueError, match="object refs"):
            gone.open()

    def test_steps_below_dram_do_not_count(self):
        key, data = sample_chunk(1, 20_000)
        ref, opener = ray.put(data), FakeOpener()
        first, _, last = restore_sources(
            [step(m.Tier.DRAM, key), step(m.Tier.SSD), step(m.Tier.DRAM)],
            lambda: [ref, None],
            {m.Tier.SSD: opener},
            1.0,
        )
        assert first.open().header.key == key
        with pytest.raises(ValueError, match="object refs"):
            last.open()

    def test_a_store_that_is_gone_is_told_by_every_chunk(self):
        def checkout():
            asked.append(1)
            raise ray.exceptions.RayActorError

        asked = []

        sources = restore_sources([step(m.Tier.DRAM), step(m.Tier.DRAM)], checkout, {}, 1.0)
        for source in sources:
            source.prefetch()  # says nothing
        for source in sources:
            with pytest.raises(ray.exceptions.RayActorError):
                source.open()
        assert asked == [1]


def late_object():
    """A reference to what comes after three seconds."""

    @ray.remote(num_cpus=0)
    def late():
        import time

        time.sleep(3.0)

    return late.remote()


def recorded(function, calls):
    def call(*args, **options):
        calls.append((*args, options))
        return function(*args, **options)

    return call
