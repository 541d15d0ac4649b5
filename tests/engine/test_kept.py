"""HBM as a tier: what stays in the pool is found, shared and given up; answers are what they would be without."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from actors.engine.params import SamplingParams
from actors.engine.turns import Request
from storage.keys import chain
from tests.engine.harness import CHUNK, GREEDY, Owner, make_engine
from tests.engine.models import loaded, random_prompt, stock_answer

PROMPT = random_prompt(70, 1)


def _owner(**settings: object) -> Owner:
    return Owner(make_engine(loaded("llama"), keep_finished=True, **settings))


def _next_prompt(owner: Owner, turn_id: str, num_new: int, seed: int) -> tuple[int, ...]:
    history = (*owner.requests[turn_id].token_ids, *owner.results[turn_id].token_ids)
    return (*history, *random_prompt(num_new, seed))


def _check(owner: Owner, turn_id: str) -> None:
    prompt = owner.requests[turn_id].token_ids
    assert owner.results[turn_id].token_ids == stock_answer("llama", prompt, len(owner.results[turn_id].tokens))


def test_the_next_turn_finds_everything_that_was_computed() -> None:
    owner = _owner()
    owner.add("t0", PROMPT)
    owner.run()
    for i in range(1, 4):
        owner.add(f"t{i}", _next_prompt(owner, f"t{i - 1}", 5, i))
        [info] = owner.run()[f"t{i}"].started
        assert info.num_in_hbm == len(owner.requests[f"t{i}"].token_ids) - 6  # the last answer token has no KV yet
        _check(owner, f"t{i}")
    stored = owner.store.plan(_next_prompt(owner, "t3", 1, 9), cuts=(108,))
    assert stored[-1].end >= 108  # and all of it was offered to the store, the extended tails too


def test_blocks_follow_their_neighbours_so_that_a_conversation_stays_in_one_piece() -> None:
    owner = _owner()
    owner.add("t0", PROMPT)
    owner.run()
    owner.add("t1", _next_prompt(owner, "t0", 20, 1))
    while not owner.results["t1"].tokens:
        owner.step()
    assert owner.engine._sequences["t1"].table.first_if_contiguous is not None


def test_turns_that_begin_alike_share_blocks() -> None:
    owner = _owner()
    system = random_prompt(64, 3)
    owner.add("first", (*system, *random_prompt(5, 4)), replace(GREEDY, max_new_tokens=30))
    while len(owner.results["first"].tokens) < 2:
        owner.step()
    owner.add("second", (*system, *random_prompt(9, 5)))
    while not owner.results["second"].started:
        owner.step()
    tables = [owner.engine._sequences[name].table.blocks for name in ("first", "second")]
    assert tables[0][:16] == tables[1][:16]  # while the first is still running
    assert owner.results["second"].started[0].num_in_hbm == 64
    owner.run()
    _check(owner, "first")
    _check(owner, "second")


def test_a_branch_that_leaves_inside_the_tail_does_not_take_it() -> None:
    owner = _owner()
    owner.add("t0", PROMPT)
    owner.run()
    history = _next_prompt(owner, "t0", 4, 1)
    edited = (*history[:72], *random_prompt(6, 8))
    owner.add("edited", edited)
    assert owner.run()["edited"].started[0].num_in_hbm == 64
    owner.add("goes on", history)
    assert owner.run()["goes on"].started[0].num_in_hbm == 77
    _check(owner, "edited")
    _check(owner, "goes on")


def test_what_hbm_lacks_is_loaded_behind_what_it_has() -> None:
    owner = _owner()
    owner.add("t0", PROMPT[:40], SamplingParams(max_new_tokens=1))
    owner.run()
    other = Owner(make_engine(loaded("llama")), owner.store)
    other.add("all", PROMPT)
    other.run()
    owner.add("t1", PROMPT, restore=tuple(owner.store.plan(PROMPT)))
    [info] = owner.run()["t1"].started
    assert (info.num_in_hbm, info.loaded) == (32, ((32, 69),))  # the store's chunk reaches further than the tail here
    _check(owner, "t1")


def test_turns_without_reuse_neither_find_nor_leave_anything() -> None:
    owner = _owner()
    owner.add("t0", PROMPT, save=False)
    owner.run()
    assert owner.engine.stats()["chunks_kept"] == 0
    owner.add("t1", PROMPT)
    owner.run()
    owner.add("t2", PROMPT, save=False)
    assert owner.run()["t2"].started[0].num_in_hbm == 0
    _check(owner, "t2")


def test_kept_blocks_make_room_oldest_leaf_first() -> None:
    owner = _owner(kv_tokens=160)
    for i in range(3):
        owner.add(f"t{i}", random_prompt(60, 30 + i), SamplingParams(max_new_tokens=1))
        owner.run()
    assert owner.engine.stats()["chunks_kept_evicted"] > 0
    owner.add("newest", random_prompt(60, 32), SamplingParams(max_new_tokens=1))
    assert owner.run()["newest"].started[0].num_in_hbm == 48
    _check(owner, "newest")


def test_a_shared_prefix_outlives_what_follows_it() -> None:
    owner = _owner(kv_tokens=128)
    system = random_prompt(32, 3)
    for i in range(5):
        owner.add(f"t{i}", (*system, *random_prompt(40, 40 + i)), SamplingParams(max_new_tokens=1))
        owner.run()
        if i:
            assert owner.results[f"t{i}"].started[0].num_in_hbm == 32


def test_tails_give_their_slots_to_chunks_that_are_computed() -> None:
    owner = _owner(write_buffer_chunks=2)
    for i in range(4):
        owner.add(f"t{i}", random_prompt(20, 60 + i), SamplingParams(max_new_tokens=2, ignore_eos=True))
        owner.run()
    assert owner.engine.stats()["turns_not_saved"] == 0
    assert owner.engine._kept is not None
    assert owner.engine._kept.num_tails > 0


def test_a_turn_whose_kv_is_bad_leaves_nothing_behind() -> None:
    owner = _owner()
    owner.add("t0", PROMPT, replace(GREEDY, max_new_tokens=20))
    while len(owner.results["t0"].tokens) < 3:
        owner.step()
    blocks = owner.engine._sequences["t0"].table.blocks
    owner.engine._pool.values[2][blocks[3]] = float("nan")
    owner.run()
    assert owner.results["t0"].error is not None
    assert owner.engine.stats()["chunks_kept"] == 0
    owner.add("t1", PROMPT)
    owner.run()
    _check(owner, "t1")


@pytest.mark.parametrize("seed", range(4))
def test_conversations_that_take_turns(seed: int) -> None:
    """More conversations than HBM holds, some from one system prompt, some retried: answers are as without reuse."""
    rng = random.Random(seed)
    owner = _owner(kv_tokens=rng.choice([200, 320]), shuffle=seed, write_buffer_chunks=rng.choice([2, 8]))
    system = random_prompt(40, 3)
    history = {i: (*system, *random_prompt(4, 70 + i)) for i in range(5)}
    num_in_hbm = 0
    for turn in range(25):
        i = rng.randrange(5)
        if len(history[i]) > 120:
            continue
        cuts = (len(history[i]) - rng.randrange(1, 4),)
        restore = tuple(owner.store.plan(history[i], cuts)) if rng.random() < 0.5 else ()
        owner.add(f"t{turn}", history[i], replace(GREEDY, max_new_tokens=rng.randint(1, 6)), restore=restore)
        while rng.random() < 0.7:
            owner.step()
        if rng.random() < 0.6:
            owner.run()
            if rng.random() < 0.9:  # else: asked the same again
                history[i] = _next_prompt(owner, f"t{turn}", rng.randint(1, 9), turn)
    owner.run()
    for turn_id, result in owner.results.items():
        _check(owner, turn_id)
        num_in_hbm += sum(info.num_in_hbm for info in result.started)
    assert num_in_hbm > 5 * CHUNK


def test_what_goes_on_from_a_dropped_chunk_is_not_kept() -> None:
    """Blocks that cannot be evicted must never count as room, however the tree was torn."""
    owner = _owner(kv_tokens=200)
    system = random_prompt(32, 3)
    owner.add("a", (*system, *random_prompt(6, 4)), replace(GREEDY, max_new_tokens=40))
    while len(owner.results["a"].tokens) < 2:
        owner.step()
    owner.add("b", (*system, *random_prompt(6, 5)), replace(GREEDY, max_new_tokens=60))
    while len(owner.results["b"].tokens) < 2:
        owner.step()
    blocks = owner.engine._sequences["a"].table.blocks
    owner.engine._pool.values[2][blocks[9]] = float("nan")  # of its own, behind the shared ones
    while owner.results["a"].finish is None:
        owner.step()
    assert owner.results["a"].error is not None
    assert owner.engine.stats()["chunks_kept"] == 0
    owner.add("c", (*system, *random_prompt(4, 6)), replace(GREEDY, max_new_tokens=1))
    while owner.results["c"].finish is None:
        owner.step()
    for _ in range(12):  # b fills chunks behind the prefix that is c's now
        owner.step()
    owner.add("d", random_prompt(100, 7), replace(GREEDY, max_new_tokens=8))
    owner.run()
    for turn_id in ("b", "c", "d"):
        _check(owner, turn_id)


# --- forgetting -------------------------------------------------------------------------------------------------------


def _keys(owner: Owner, tokens: tuple[int, ...]) -> list[str]:
    """Of all prefixes of these tokens that end with a chunk, and of all of them."""
    return [key for _, key in chain(owner.engine.loaded.key_space().root(), tokens, CHUNK)]


def test_what_is_forgotten_is_not_found_nor_what_goes_on_from_it() -> None:
    owner = _owner()
    system = random_prompt(32, 3)
    mine, other = (*system, *random_prompt(30, 4)), (*system, *random_prompt(20, 5))
    for name, prompt in (("mine", mine), ("other", other)):
        owner.add(name, prompt)
        owner.run()
    engine, keys = owner.engine, _keys(owner, mine)
    assert engine.kept(keys) == keys[:3], "the full chunks; the prompt's end lies inside a tail"
    before = len(engine.kept(_keys(owner, other)))
    engine.forget(keys[2:3])
    assert engine.has_work
    engine.step()
    engine.check()
    assert engine.kept(keys) == keys[:2]
    assert len(engine.kept(_keys(owner, other))) == before
    owner.add("again", mine)
    assert owner.run()["again"].started[0].num_in_hbm == 32
    _check(owner, "again")


def test_a_mark_inside_a_tail_is_enough() -> None:
    owner = _owner()
    owner.add("t0", PROMPT)
    owner.run()
    [tail] = [chunk for chunk in owner.engine._kept._by_key.values() if chunk.is_tail]  # type: ignore[union-attr]
    assert owner.engine.kept([tail.key]) == [tail.key]
    owner.engine.forget(_keys(owner, PROMPT)[-1:])
    owner.engine.step()
    assert owner.engine.kept([tail.key]) == []
    owner.engine.check()
    owner.add("t1", _next_prompt(owner, "t0", 3, 1))
    assert owner.run()["t1"].started[0].num_in_hbm == 64
    _check(owner, "t1")


def test_a_running_turn_whose_text_is_forgotten_leaves_nothing() -> None:
    owner = _owner()
    owner.add("t0", PROMPT, replace(GREEDY, max_new_tokens=30))
    while len(owner.results["t0"].tokens) < 3:
        owner.step()
    offered = len(owner.store.chunks)
    owner.engine.forget(_keys(owner, PROMPT)[-1:])  # of its prompt's end, inside the chunk that it is writing
    owner.run()
    _check(owner, "t0")
    assert len(owner.store.chunks) == offered
    assert owner.engine.stats()["chunks_kept"] == 4, "what is in front of that"
    owner.engine.check()


def test_what_is_on_offer_is_forgotten_too() -> None:
    engine = make_engine(loaded("llama"), keep_finished=True)
    root = engine.loaded.key_space().root()
    engine.add(Request(turn_id="t", token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=1), root=root))
    while engine.has_work:
        engine.step()
    chunks = {chunk.header.start: chunk.header.key for chunk in engine.ready_chunks()}
    assert sorted(chunks) == [0, 16, 32, 48, 64]
    engine.forget([chunks[16]])
    engine.step()
    engine.take_chunk(chunks[0])
    for start in (16, 32, 48, 64):
        with pytest.raises(KeyError):
            engine.take_chunk(chunks[start])
    assert engine.kept(chunks.values()) == [chunks[0]]
    engine.close()
