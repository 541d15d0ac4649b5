"""What is restored, what is not, and that a bad chunk costs time but never changes an answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from actors.engine.params import SamplingParams
from actors.engine.turns import FinishReason, RestoreSource
from storage.format import ChunkReader, RangeSource, encode, read_chunk
from tests.engine.harness import CHUNK, GREEDY, Owner, make_engine
from tests.engine.models import loaded, random_prompt, stock_answer

PROMPT = random_prompt(70, 1)  # chunks [0, 16) … [48, 64), and a tail


@pytest.fixture
def owner() -> Owner:
    """An engine whose store holds the whole of PROMPT."""
    owner = Owner(make_engine(loaded("llama"), shuffle=1))
    owner.add("first", PROMPT, SamplingParams(max_new_tokens=1))
    owner.run()
    return owner


def _damage(data: np.ndarray, at: float) -> np.ndarray:
    data = data.copy()
    data[int(len(data) * at)] ^= 0x40
    return data


def _run(
    owner: Owner, sources: list[RestoreSource], prompt: tuple[int, ...] = PROMPT
) -> tuple[int, list[tuple[str, str, int]]]:
    owner.add("again", prompt, GREEDY, restore=tuple(sources))
    result = owner.run()["again"]
    assert result.token_ids == stock_answer("llama", prompt, 8)
    [info] = result.started
    return info.num_reused, [(failed.key, failed.reason, failed.num_tokens) for failed in info.failed]


def test_the_last_token_is_always_computed(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT)
    assert sources[-1].end == 70
    owner.store.chunks.clear()
    assert _run(owner, sources) == (69, [])
    assert all(
        header.start >= 64 for header, _ in owner.store.chunks.values()
    )  # what was restored is not offered again


def test_a_prompt_that_ends_with_a_full_chunk(owner: Owner) -> None:
    prompt = PROMPT[:64]
    sources = owner.store.plan(prompt)
    owner.store.chunks.clear()
    assert _run(owner, sources, prompt) == (63, [])
    assert [header.start for header, _ in owner.store.chunks.values()] == [64]


def test_a_plan_may_stop_anywhere(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT, limit=41)  # not at a mark
    assert [source.num_tokens for source in sources] == [16, 16, 9]
    assert _run(owner, sources) == (41, [])


@pytest.mark.parametrize("at", [0.02, 0.4, 0.75, 0.999])
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_corrupt_chunk_ends_the_reuse_at_its_start(owner: Owner, bad: int, at: float) -> None:
    sources = owner.store.plan(PROMPT)
    key = sources[bad].key
    data = _damage(owner.store.chunks[key][1], at)
    sources[bad] = replace(sources[bad], open=lambda: read_chunk(data))
    num_reused, failed = _run(owner, sources)
    if at == 0.999 and not failed:
        assert num_reused == 69  # padding at the very end is not part of any layer
    else:
        assert (num_reused, failed) == (16 * bad, [(key, "corrupt", 69 - 16 * bad)])


def test_chunks_after_a_corrupt_one_are_offered_again(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT)
    data = _damage(owner.store.chunks[sources[1].key][1], 0.5)
    sources[1] = replace(sources[1], open=lambda: read_chunk(data))
    owner.store.chunks.clear()
    _run(owner, sources)
    assert sorted(header.start for header, _ in owner.store.chunks.values()) == [16, 32, 48, 64]


def test_a_failed_restore_gives_the_slot_of_its_tail_to_the_chunk_that_is_computed_first(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT)
    sources[1] = replace(sources[1], open=_raise(OSError("gone")))
    frugal = Owner(make_engine(loaded("llama"), write_buffer_chunks=1), owner.store)
    owner.store.chunks.clear()
    _run(frugal, sources)
    assert 16 in [header.start for header, _ in owner.store.chunks.values()]


def _raise(error: Exception) -> Callable[[], ChunkReader]:
    def opener() -> ChunkReader:
        raise error

    return opener


def test_a_lost_chunk_is_recomputed(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT)
    sources[3] = replace(sources[3], open=_raise(OSError("disk gone")))
    assert _run(owner, sources) == (48, [(sources[3].key, "lost", 21)])
    assert "disk gone" in owner.results["again"].started[0].failed[0].detail


def test_two_failures_share_the_blame(owner: Owner) -> None:
    """One chunk does not open, an earlier one fails its checksum in a later layer."""
    sources = owner.store.plan(PROMPT)
    data = _damage(owner.store.chunks[sources[1].key][1], 0.75)
    sources[1] = replace(sources[1], open=lambda: read_chunk(data))
    sources[3] = replace(sources[3], open=_raise(KeyError("gone")))
    assert _run(owner, sources) == (16, [(sources[1].key, "corrupt", 32), (sources[3].key, "lost", 21)])


def test_a_source_that_breaks_while_it_is_read(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT)
    data = owner.store.chunks[sources[0].key][1]

    def read(offset: int, length: int) -> np.ndarray:
        if offset > len(data) // 2:
            raise ConnectionError("the bucket hung up")
        return data[offset : offset + length]

    reader_source = RangeSource(read=read, num_bytes=len(data))
    sources[0] = replace(sources[0], open=lambda: read_chunk(reader_source))
    num_reused, failed = _run(owner, sources)
    # A chunk this small comes whole with its first read, unless it is larger than that.
    assert (num_reused, failed) in [(69, []), (0, [(sources[0].key, "lost", 69)])]


def test_chunks_of_other_tokens_prefixes_or_models_are_refused(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT)
    header, data = owner.store.chunks[sources[1].key]
    layers = list(read_chunk(data).layers())
    wrong = {
        "tokens": replace(header, token_ids=(*header.token_ids[:-1], header.token_ids[-1] ^ 1)),
        "prefix": replace(header, parent="ab" * 32),
        "model": replace(header, root="cd" * 32),
    }
    for name, other in wrong.items():
        fake = encode(other, layers)
        plan = [sources[0], replace(sources[1], open=lambda fake=fake: read_chunk(fake)), *sources[2:]]
        assert _run(owner, plan) == (16, [(sources[1].key, "corrupt", 53)]), name


def test_restoring_does_not_hold_up_other_turns(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT)
    go = threading.Event()
    key = sources[0].key
    data = owner.store.chunks[key][1]

    def slow() -> ChunkReader:
        assert go.wait(30)
        return read_chunk(data)

    sources[0] = replace(sources[0], open=slow)
    owner.add("slow", PROMPT, GREEDY, restore=tuple(sources))
    owner.add("quick", random_prompt(20, 5), GREEDY)
    while owner.results["quick"].finish is None:
        owner.step()
    assert owner.results["slow"].started == []
    go.set()
    result = owner.run()["slow"]
    assert result.token_ids == stock_answer("llama", PROMPT, 8)
    assert result.started[0].restore_s > 0


def test_aborting_a_turn_while_it_loads(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT)
    go = threading.Event()

    def slow() -> ChunkReader:
        assert go.wait(30)
        raise OSError("too late")

    sources[0] = replace(sources[0], open=slow)
    owner.add("t", PROMPT, GREEDY, restore=tuple(sources))
    owner.step()
    owner.engine.abort("t")
    owner.step()
    assert owner.results["t"].finish is FinishReason.ABORTED
    assert owner.engine.stats()["blocks_free"] < owner.engine.stats()["blocks"]  # its loader may still write to them
    go.set()
    owner.run()
    assert owner.engine.stats()["blocks_free"] == owner.engine.stats()["blocks"]


def test_requests_that_do_not_add_up_are_refused(owner: Owner) -> None:
    sources = owner.store.plan(PROMPT)
    with pytest.raises(ValueError, match="without a gap"):
        owner.add("t", PROMPT, GREEDY, restore=(sources[0], sources[2]))
    with pytest.raises(ValueError, match="covers 16 tokens of 9"):
        owner.add("t", PROMPT[:9], GREEDY, restore=(sources[0],))
    with pytest.raises(ValueError, match="another setting"):
        owner.add("t", PROMPT, GREEDY, restore=(replace(sources[0], num_tokens=CHUNK + 4),))
