"""Which chunks a turn offers, with which marks, and what happens when there is no room for them."""

from __future__ import annotations

import threading

import pytest

from actors.engine.params import SamplingParams
from actors.engine.save import Bytes, SaveJob
from actors.engine.turns import FinishReason
from storage.format import ChunkHeader
from storage.keys import chain
from tests.engine.harness import CHUNK, GREEDY, Owner, make_engine
from tests.engine.models import loaded, random_prompt, stock_answer

PROMPT = random_prompt(41, 1)


def _ends(owner: Owner) -> list[tuple[int, list[int]]]:
    return sorted((header.start, [end for end, _ in header.marks]) for header, _ in owner.store.chunks.values())


def test_chunks_carry_cuts_the_prompt_end_and_their_own_end() -> None:
    owner = Owner(make_engine(loaded("llama")))
    owner.add("t", PROMPT, GREEDY, cuts=(5, 16, 20, 200))
    tokens = (*PROMPT, *owner.run()["t"].token_ids)
    # 41 + 8 tokens, of which the last was never fed
    assert _ends(owner) == [(0, [5, 16]), (16, [20, 32]), (32, [41, 48])]
    marks = dict(chain(owner.store.root, tokens[:48], CHUNK, cuts=(5, 20, 41)))
    for header, _ in owner.store.chunks.values():
        assert dict(header.marks).items() <= marks.items()
        assert header.token_ids == tokens[header.start : header.end]
        assert header.parent == (marks[header.start] if header.start else None)


def test_nothing_is_offered_for_a_turn_that_is_not_to_be_saved() -> None:
    owner = Owner(make_engine(loaded("llama")))
    owner.add("t", PROMPT, GREEDY, save=False)
    owner.run()
    assert owner.store.chunks == {}


def test_without_slots_the_answer_is_the_same_and_nothing_is_saved() -> None:
    owner = Owner(make_engine(loaded("llama"), write_buffer_chunks=0))
    owner.add("t", PROMPT, GREEDY)
    assert owner.run()["t"].token_ids == stock_answer("llama", PROMPT, 8)
    assert owner.store.chunks == {}
    assert owner.engine.stats()["turns_not_saved"] == 1


def test_with_few_slots_there_are_fewer_chunks_and_never_a_hole() -> None:
    owner = Owner(make_engine(loaded("llama"), write_buffer_chunks=2, max_step_tokens=200))
    prompts = {f"t{i}": random_prompt(60 + i, 20 + i) for i in range(4)}
    for turn_id, prompt in prompts.items():
        owner.add(turn_id, prompt, GREEDY)
    results = owner.run()
    for turn_id, prompt in prompts.items():
        assert results[turn_id].token_ids == stock_answer("llama", prompt, 8)
    assert 0 < len(owner.store.chunks) < 4 * 5
    keys = set(owner.store.by_mark)
    for header, _ in owner.store.chunks.values():
        assert header.parent is None or header.parent in keys  # every chunk can be reached
    assert owner.engine.stats()["slots_free"] == 2


def test_a_restored_tail_without_a_slot_is_not_extended() -> None:
    first = Owner(make_engine(loaded("llama")))
    first.add("t", PROMPT, GREEDY)
    first.run()
    plan = first.store.plan(PROMPT)
    assert plan[-1].end == 41
    owner = Owner(make_engine(loaded("llama"), write_buffer_chunks=0))
    longer = (*PROMPT, 9, 8, 7)
    owner.add("t", longer, GREEDY, restore=tuple(plan))
    result = owner.run()["t"]
    assert result.started[0].num_reused == 41
    assert result.token_ids == stock_answer("llama", longer, 8)
    assert owner.store.chunks == {}


def test_equal_prompts_are_offered_once() -> None:
    engine = make_engine(loaded("llama"))
    owner = Owner(engine)
    for turn_id in ("a", "b"):
        owner.add(turn_id, PROMPT, SamplingParams(max_new_tokens=1))
    offered = []
    while engine.has_work:
        engine.step()
        offered += [ready.header.key for ready in engine.ready_chunks()]
    assert len(offered) == len(set(offered)) == 3


def test_what_nobody_takes_is_bounded_and_can_be_dropped() -> None:
    engine = make_engine(loaded("llama"), max_ready_chunks=2)
    Owner(engine).add("t", PROMPT, GREEDY)
    while engine.has_work:
        engine.step()
    first, second = engine.ready_chunks()
    assert [first.header.start, second.header.start] == [0, 16]  # the newest was dropped
    assert engine.ready_chunks() == []
    assert engine.stats()["ready_dropped"] == 1
    engine.drop_chunk(first.header.key)
    engine.drop_chunk("unknown")
    assert engine.stats()["ready_bytes"] == second.num_bytes
    assert engine.take_chunk(second.header.key).nbytes == second.num_bytes


def test_blocks_are_not_used_again_before_their_chunk_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saver is held up; meanwhile another turn wants every block there is."""
    owner = Owner(make_engine(loaded("llama"), kv_tokens=60))
    saver, go = owner.engine._saver, threading.Event()
    encode = saver._encode

    def wait_and_encode(job: SaveJob, header: ChunkHeader) -> Bytes:
        assert go.wait(30)
        return encode(job, header)

    monkeypatch.setattr(saver, "_encode", wait_and_encode)
    owner.add("first", PROMPT, SamplingParams(max_new_tokens=1))
    other = random_prompt(50, 7)
    owner.add("second", other, SamplingParams(max_new_tokens=1))
    for _ in range(8):
        owner.step_without_taking()
    assert owner.results["first"].finish is not None
    assert owner.results["second"].started == []  # the answer of the first did not wait, the second does
    go.set()
    owner.take_chunks()
    owner.run()
    longer = (*PROMPT, 9)
    again = Owner(make_engine(loaded("llama")))
    again.add("t", longer, GREEDY, restore=tuple(owner.store.plan(longer, cuts=(41,))))
    result = again.run()["t"]
    assert result.started[0].num_reused == 41
    assert result.token_ids == stock_answer("llama", longer, 8)


def test_chunks_of_a_turn_that_fails_in_the_same_step_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(make_engine(loaded("llama"), max_step_tokens=100))
    forward = owner.engine._runner.forward
    monkeypatch.setattr(owner.engine._runner, "forward", lambda batch: forward(batch) * float("nan"))
    owner.add("t", PROMPT, GREEDY)
    assert owner.run()["t"].finish is FinishReason.FAILED
    assert owner.store.chunks == {}


def test_an_aborted_turn_keeps_what_it_had_computed() -> None:
    owner = Owner(make_engine(loaded("llama"), max_step_tokens=10))
    owner.add("t", PROMPT, GREEDY)
    owner.step()
    owner.step()
    owner.engine.abort("t")
    owner.run()
    assert _ends(owner) == [(0, [16]), (16, [20])]


def test_chunks_of_a_finished_turn_are_announced_with_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hears that the turn is over must find its chunks known, encoded or not: the next may come at once."""
    engine = make_engine(loaded("llama"))
    saver, go = engine._saver, threading.Event()
    encode = saver._encode

    def wait_and_encode(job: SaveJob, header: ChunkHeader) -> Bytes:
        assert go.wait(30)
        return encode(job, header)

    monkeypatch.setattr(saver, "_encode", wait_and_encode)
    Owner(engine).add("t", PROMPT, SamplingParams(max_new_tokens=1))
    while not any(output.finish_reason for output in engine.step()):
        pass
    announced = engine.ready_chunks()
    assert announced[-1].header.end == len(PROMPT)
    threading.Timer(0.05, go.set).start()
    assert engine.take_chunk(announced[-1].header.key).nbytes == announced[-1].num_bytes
    while engine.has_work:
        engine.step()
    engine.check()
