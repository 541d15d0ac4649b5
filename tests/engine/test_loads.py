"""Turns and the loads they wait for: overlap by layer, from the tail, deadlines; never a token read too early.

Sources are throttled, so that what happens while a load runs does not depend on the machine. Fresh blocks are poisoned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.engine.load import Load, Restored
from actors.engine.overlap import LoadOrder
from actors.engine.params import SamplingParams
from actors.engine.runner import Batch
from actors.engine.sequence import Sequence
from actors.engine.turns import FinishReason, RestoreSource, StartInfo
from storage.format import ChunkReader, RangeSource
from tests.engine.harness import CHUNK, GREEDY, Owner, make_engine
from tests.engine.models import loaded, random_prompt, stock_answer

PROMPT = random_prompt(150, 1)  # chunks [0, 16) … [128, 144), and a tail
FIRST_READ = 64 * 1024


class Throttle:
    """Chunks that give their layers one at a time, when told to."""

    def __init__(self, data: np.ndarray, before_layer: Callable[[int], None]) -> None:
        self._data, self._before = data, before_layer

    def open(self) -> ChunkReader:
        return _LayerReader(self._data, self._before)


class _LayerReader(ChunkReader):
    def __init__(self, data: np.ndarray, before_layer: Callable[[int], None]) -> None:
        super().__init__(RangeSource(read=lambda offset, length: data[offset : offset + length], num_bytes=len(data)))
        self._before = before_layer

    def layer(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        self._before(i)
        return super().layer(i)


def _filled(**settings: object) -> Owner:
    """An engine whose store holds the whole of PROMPT, with steps long enough to be joined."""
    owner = Owner(make_engine(loaded("llama"), max_step_tokens=64, **settings))
    owner.add("first", PROMPT, SamplingParams(max_new_tokens=1))
    owner.run()
    return owner


def _throttled(owner: Owner, before_layer: Callable[[int], None], only: int | None = None) -> list[RestoreSource]:
    sources = owner.store.plan(PROMPT)
    for i, source in enumerate(sources):
        if only is None or i == only:
            throttle = Throttle(owner.store.chunks[source.key][1], before_layer)
            sources[i] = replace(source, open=throttle.open, place="slow", num_bytes=1000)
    return sources


def _gone() -> ChunkReader:
    raise OSError("gone")


def _on_joining(owner: Owner, do: Callable[[], None]) -> list[int]:
    """`do` is called when a step joins a load; how many layers were in place by then, of each that did."""
    forward, num_ready = owner.engine._runner.forward, list[int]()

    def watched(batch: Batch) -> torch.Tensor:
        if batch.gates:
            num_ready.append(batch.gates[0]._load.layers_ready)
            do()
        return forward(batch)

    owner.engine._runner.forward = watched  # type: ignore[method-assign]
    return num_ready


def _spans(owner: Owner, known: set[str]) -> list[tuple[int, int]]:
    """Of the chunks that were stored, all but the known ones."""
    return sorted((header.start, header.end) for key, (header, _) in owner.store.chunks.items() if key not in known)


def _is_right(owner: Owner, turn_id: str, prompt: tuple[int, ...]) -> bool:
    return owner.results[turn_id].token_ids == stock_answer("llama", prompt, len(owner.results[turn_id].tokens))


# --- layer by layer ---------------------------------------------------------------------------------------------------


def test_a_step_joins_a_load_before_its_last_layer_is_there() -> None:
    owner = _filled()
    owner.engine.meter.prefill_tokens_per_s = 20.0  # 1.5 s for the 30 new tokens: any load of less is worth joining
    last_layer = threading.Event()
    joined_after = _on_joining(owner, last_layer.set)

    def before(layer: int) -> None:
        if layer == 3:
            assert last_layer.wait(20), "nobody joined: the load would have been waited for"

    prompt = (*PROMPT, *random_prompt(30, 2))
    owner.add("t", prompt, GREEDY, restore=tuple(_throttled(owner, before, only=0)))
    result = owner.run()["t"]
    assert joined_after
    assert joined_after[0] < 4
    assert _is_right(owner, "t", prompt)
    assert result.started[0].loaded == ((0, 150),)


def test_a_turn_that_is_alone_joins_the_step_that_admits_it_before_any_layer_is_there() -> None:
    owner = _filled()
    owner.engine.meter.prefill_tokens_per_s = 20.0
    owner.engine._rates._s_per_byte["slow"] = 1.2e-4  # 1.2 s for all that is loaded
    owner.engine._rates._lead_s["slow"] = 0.1  # of them 1 s before the first layer
    joined = threading.Event()
    joined_after = _on_joining(owner, joined.set)

    def before(layer: int) -> None:
        if layer == 0:
            assert joined.wait(20), "nobody joined"

    prompt = (*PROMPT, *random_prompt(30, 2))
    owner.add("t", prompt, GREEDY, restore=tuple(_throttled(owner, before)))
    owner.step()
    assert joined_after == [0]
    result = owner.run()["t"]
    assert _is_right(owner, "t", prompt)
    assert result.started[0].loaded == ((0, 150),)


def test_nobody_joins_a_load_that_may_not_have_begun() -> None:
    owner = _filled(num_loaders=1)
    owner.engine.meter.prefill_tokens_per_s = 20.0
    owner.engine._rates._s_per_byte["slow"] = 1.2e-4
    owner.engine._rates._lead_s["slow"] = 0.1
    go = threading.Event()
    joined_after = _on_joining(owner, go.set)

    def before(_: int) -> None:
        assert go.wait(20)

    sources = tuple(_throttled(owner, before))
    for name, new in (("a", 2), ("b", 3)):
        owner.add(name, (*PROMPT, *random_prompt(30, new)), GREEDY, restore=sources)
    owner.step()
    assert joined_after == []
    go.set()
    owner.run()
    assert _is_right(owner, "a", (*PROMPT, *random_prompt(30, 2)))
    assert _is_right(owner, "b", (*PROMPT, *random_prompt(30, 3)))


def test_what_is_computed_behind_a_joined_load_is_saved_and_stays() -> None:
    owner = _filled(keep_finished=True)
    owner.engine.forget_kept()
    owner.engine.meter.prefill_tokens_per_s = 20.0
    last_layer = threading.Event()
    joined_after = _on_joining(owner, last_layer.set)

    def before(layer: int) -> None:
        if layer == 3:
            assert last_layer.wait(20)

    prompt = (*PROMPT, *random_prompt(30, 2))
    known = set(owner.store.chunks)
    owner.add("t", prompt, GREEDY, restore=tuple(_throttled(owner, before, only=0)))
    history = (*prompt, *owner.run()["t"].token_ids)
    assert joined_after
    assert _spans(owner, known) == [(144, 160), (160, 176), (176, 187)]

    longer = (*history, *random_prompt(9, 3))
    elsewhere = Owner(make_engine(loaded("llama")), owner.store)
    elsewhere.add("next", longer, GREEDY, restore=tuple(owner.store.plan(longer, cuts=(187,))))
    owner.add("next", longer)
    for other, found in ((owner, "num_in_hbm"), (elsewhere, "num_loaded")):
        [info] = other.run()["next"].started
        assert getattr(info, found) == 187
        assert _is_right(other, "next", longer)


def test_a_late_layer_voids_the_turns_part_of_a_step_and_nobody_elses() -> None:
    owner = _filled()
    owner.engine.meter.prefill_tokens_per_s = 20_000.0  # a joined step is patient for 50 ms
    go = threading.Event()

    def before(layer: int) -> None:
        if layer == 3:
            assert go.wait(20)

    prompt = (*PROMPT, *random_prompt(30, 2))
    owner.engine._restoring._joins = lambda restore, _: restore.may_join and restore.load.layers_ready >= 2  # type: ignore[method-assign]
    known = set(owner.store.chunks)
    owner.add("t", prompt, GREEDY, restore=tuple(_throttled(owner, before, only=0)))
    owner.add("other", random_prompt(20, 5), replace(GREEDY, max_new_tokens=30))
    while owner.results["other"].finish is None:
        owner.step()
    assert _is_right(owner, "other", random_prompt(20, 5))
    assert not owner.results["t"].started
    go.set()
    owner.run()
    assert _is_right(owner, "t", prompt)
    assert owner.results["t"].started[0].num_reused == 150
    assert {(144, 160), (160, 176), (176, 187)} <= set(_spans(owner, known))


def test_a_load_that_fails_under_a_step_is_computed_again() -> None:
    owner = _filled()
    owner.engine.meter.prefill_tokens_per_s = 20.0
    may_fail = threading.Event()

    def before(layer: int) -> None:
        if layer == 2:
            assert may_fail.wait(20)
            raise ConnectionError("the bucket hung up")

    _on_joining(owner, may_fail.set)
    prompt = (*PROMPT, *random_prompt(30, 2))
    sources = _throttled(owner, before, only=4)
    owner.store.chunks.clear()
    owner.add("t", prompt, GREEDY, restore=tuple(sources))
    result = owner.run()["t"]
    assert may_fail.is_set()
    assert _is_right(owner, "t", prompt)
    [info] = result.started
    assert info.loaded == ((0, 64),)
    assert [(failed.reason, failed.num_tokens) for failed in info.failed] == [("lost", 86)]
    assert _spans(owner, set()) == [*((start, start + CHUNK) for start in range(64, 176, CHUNK)), (176, 187)]


# --- from the tail ----------------------------------------------------------------------------------------------------


def test_the_front_is_computed_while_the_tail_loads() -> None:
    owner = _filled(order=LoadOrder.TAIL)
    owner.engine.meter.prefill_tokens_per_s = 1000.0
    prompt = (*PROMPT, *random_prompt(9, 2))
    owner.add(
        "t", prompt, GREEDY, restore=tuple(_throttled(owner, lambda layer: time.sleep(0.01 if layer == 0 else 0)))
    )
    owner.store.chunks.clear()
    result = owner.run()["t"]
    [info] = result.started
    assert _is_right(owner, "t", prompt)
    [(start, end)] = info.loaded
    assert 0 < start < end == 150
    assert info.failed == ()
    starts = sorted(header.start for header, _ in owner.store.chunks.values())
    assert starts == [144, 160]  # what the store has is not offered again, the tail is extended


def test_a_fast_load_from_the_tail_is_waited_for() -> None:
    owner = _filled(order=LoadOrder.TAIL)
    owner.engine.meter.prefill_tokens_per_s = 5.0
    sources = owner.store.plan(PROMPT)
    owner.add("t", PROMPT, GREEDY, restore=tuple(sources))
    assert owner.run()["t"].started[0].loaded == ((0, 149),)
    assert _is_right(owner, "t", PROMPT)


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_a_chunk_that_fails_leaves_a_hole(bad: int) -> None:
    owner = _filled(order=LoadOrder.TAIL)
    owner.engine.meter.prefill_tokens_per_s = 1e-3  # computing is out of the question: only the hole is
    sources = owner.store.plan(PROMPT)
    key = sources[bad].key
    sources[bad] = replace(sources[bad], open=_gone)
    prompt = (*PROMPT, *random_prompt(9, 2))
    owner.store.chunks.clear()
    owner.add("t", prompt, GREEDY, restore=tuple(sources))
    [info] = owner.run()["t"].started
    assert _is_right(owner, "t", prompt)
    start, end = bad * CHUNK, min(150, (bad + 1) * CHUNK)
    assert info.num_loaded == 150 - (end - start)
    assert [(failed.key, failed.num_tokens) for failed in info.failed] == [(key, end - start)]
    offered = {header.start for header, _ in owner.store.chunks.values()}
    assert {start, 144} <= offered


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_a_load_that_is_met_before_it_says_that_it_is_over_tells_what_failed(
    bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = _filled(order=LoadOrder.TAIL)
    owner.engine.meter.prefill_tokens_per_s = 1e-3
    adopted = threading.Event()
    adopt, finish = owner.engine._restoring.adopt, Load.finish

    def adopt_first(sequence: Sequence) -> StartInfo:
        info = adopt(sequence)
        adopted.set()
        return info

    def finish_later(load: Load, result: Restored) -> None:
        assert adopted.wait(20)
        finish(load, result)

    owner.engine._restoring.adopt = adopt_first  # type: ignore[method-assign]
    monkeypatch.setattr(Load, "finish", finish_later)
    sources = owner.store.plan(PROMPT)
    sources[bad] = replace(sources[bad], open=_gone)
    prompt = (*PROMPT, *random_prompt(9, 2))
    owner.store.chunks.clear()
    owner.add("t", prompt, GREEDY, restore=tuple(sources))
    [info] = owner.run()["t"].started
    assert _is_right(owner, "t", prompt)
    start, end = bad * CHUNK, min(150, (bad + 1) * CHUNK)
    assert [(failed.key, failed.num_tokens) for failed in info.failed] == [(sources[bad].key, end - start)]
    assert _spans(owner, set()) == sorted({(start, start + CHUNK), (144, 160), (160, 166)})  # what is stored is not


def test_many_buffered_sources_are_not_opened_at_once() -> None:
    owner = _filled(order=None, read_ahead_chunks=2)
    asked: list[str] = []
    opened: list[str] = []
    most = 0
    sources = []
    for source in owner.store.plan(PROMPT):

        def prefetch(key: str = source.key) -> None:
            nonlocal most
            asked.append(key)
            most = max(most, len(set(asked) - set(opened)))

        def open_(source: RestoreSource = source) -> ChunkReader:
            opened.append(source.key)
            return source.open()

        sources.append(replace(source, open=open_, prefetch=prefetch, buffered=True))
    owner.add("t", PROMPT, GREEDY, restore=tuple(sources))
    owner.run()
    assert _is_right(owner, "t", PROMPT)
    assert opened
    assert opened[0] == sources[-1].key
    assert most <= 3


# --- deadlines and departures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(LoadOrder))
@pytest.mark.parametrize("where", ["open", "layer"])
def test_a_load_that_hangs_is_given_up_and_the_answer_is_right(order: LoadOrder, where: str) -> None:
    owner = _filled(order=order, load_deadline_s=0.1)
    owner.engine.meter.prefill_tokens_per_s = 5.0
    hangs, go = threading.Event(), threading.Event()

    def hang(layer: int = 0) -> None:
        if layer == 1 or where == "open":
            hangs.set()
            go.wait(20)

    overdue = owner.engine._restoring.overdue  # what comes before may take its time
    owner.engine._restoring.overdue = lambda: overdue() if hangs.is_set() else []  # type: ignore[method-assign]
    sources = _throttled(owner, hang if where == "layer" else lambda _: None, only=4)
    if where == "open":
        stock = sources[4].open

        def slow() -> ChunkReader:
            hang()
            return stock()

        sources[4] = replace(sources[4], open=slow)
    owner.add("t", PROMPT, GREEDY, restore=tuple(sources))
    while owner.results["t"].finish is None:
        owner.step()
    [info] = owner.results["t"].started
    assert owner.results["t"].finish is FinishReason.LENGTH
    assert _is_right(owner, "t", PROMPT)
    assert {failed.reason for failed in info.failed} == {"late"}
    assert info.num_reused == (69 if (order, where) == (LoadOrder.TAIL, "open") else 0)  # chunks 5 … 9 were there
    assert owner.engine.has_work  # its loader has not let go
    go.set()
    owner.run()


def test_preempting_a_turn_that_loads() -> None:
    owner = _filled(kv_tokens=256)
    go = threading.Event()
    sources = _throttled(owner, lambda _: go.wait(20), only=0)
    owner.add("long", random_prompt(60, 7), replace(GREEDY, max_new_tokens=60))
    owner.step()
    owner.add("t", PROMPT, GREEDY, restore=tuple(sources))
    while owner.results["t"].num_preemptions == 0:
        owner.step()
        if owner.results["long"].finish is not None:
            pytest.fail("nobody was preempted")
    go.set()
    owner.run()
    assert _is_right(owner, "t", PROMPT)
    assert _is_right(owner, "long", random_prompt(60, 7))


def test_a_load_that_ends_just_when_it_is_given_up_counts_for_nothing() -> None:
    """Nothing was written: whatever the loader says after it was abandoned must not be believed."""
    owner = _filled(load_deadline_s=0.1)
    go = threading.Event()
    sources = owner.store.plan(PROMPT)
    last = sources[-1].open

    def slow() -> ChunkReader:
        assert go.wait(20)
        return last()

    sources[-1] = replace(sources[-1], open=slow)
    give_up = owner.engine._restoring.give_up

    def give_up_and_let_it_end(sequence: Sequence) -> bool:
        may_write = give_up(sequence)
        go.set()
        [(_, future)] = owner.engine._loader._running
        future.result(20)
        return may_write

    owner.engine._restoring.give_up = give_up_and_let_it_end  # type: ignore[method-assign]
    owner.add("t", PROMPT, GREEDY, restore=tuple(sources))
    [info] = owner.run()["t"].started
    assert owner.results["t"].finish is FinishReason.LENGTH
    assert _is_right(owner, "t", PROMPT)
    assert info.num_reused == 0
    assert {failed.reason for failed in info.failed} == {"late"}


def test_loaders_do_not_change_the_threads_of_whoever_steps() -> None:
    """torch's default for new threads is global, and loaders set it to 1."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        owner = _filled(num_threads=None)
        owner.add("t", PROMPT, GREEDY, restore=tuple(owner.store.plan(PROMPT)))
        owner.run()
        found: list[int] = []

        def step() -> None:
            owner.engine.step()
            found.append(torch.get_num_threads())

        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        assert found == [2]
    finally:
        torch.set_num_threads(before)
