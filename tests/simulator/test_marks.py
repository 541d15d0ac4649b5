"""From requests to turns and chunks: who shares what, as the live system would."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from policies.messages import ChunkInfo, Mark
from policies.simulator.hardware import SetupError
from policies.simulator.marks import Marker
from policies.simulator.trace import Request, Trace, TraceError
from tests.simulator.small import BLOCK, blocks_of, random_trace, request, trace_of

CHUNK = 2 * BLOCK  # 32


def marker_of(*requests: Request, block_tokens: int = BLOCK, **rest: Any) -> Marker:
    options = {"reuse": True, "reuse_after_truncation": False, **rest}
    return Marker(trace_of(*requests, block_tokens=block_tokens), CHUNK, 4, **options)


def with_blocks(request_id: int, session: int, num_tokens: int, num_new: int = 1, **rest: Any) -> Request:
    blocks = rest.pop("blocks", blocks_of(session, num_tokens))
    return request(request_id, num_tokens, num_new, session_id=session, blocks=blocks, **rest)


def ends(marks: tuple[Mark, ...]) -> list[int]:
    return [mark.end for mark in marks]


def keys(marks: tuple[Mark, ...]) -> dict[int, str]:
    return {mark.end: mark.key for mark in marks}


def test_marks_stand_at_multiples_and_at_the_end() -> None:
    turn = marker_of(one := with_blocks(0, 0, 70)).turn(one)
    assert ends(turn.prompt) == [32, 64, 70]
    assert (turn.num_prompt_tokens, turn.max_new_tokens) == (70, 1)


def test_a_follow_up_has_marks_where_its_history_was_cut() -> None:
    """At the earlier prompt's end and at the earlier answer's, less its last token."""
    first, second = with_blocks(0, 0, 40, 30), with_blocks(1, 0, 90, 5, parent=0)
    marker = marker_of(first, second)
    before, after = marker.turn(first), marker.turn(second)
    assert ends(before.prompt) == [32, 40]
    assert ends(after.prompt) == [32, 40, 64, 69, 90]
    assert set(before.prompt) < set(after.prompt)


def test_the_answers_chunks_are_those_that_the_follow_up_looks_for() -> None:
    first, second = with_blocks(0, 0, 40, 30), with_blocks(1, 0, 90, 5, parent=0)
    marker = marker_of(first, second)
    marker.turn(first)
    chunks = marker.chunks(first, 0)
    assert [(info.start, info.end) for info in chunks] == [(0, 32), (32, 64), (64, 69)]
    wanted = keys(marker.turn(second).prompt)
    assert all(wanted[info.end] == info.key for info in chunks)
    assert [info.parent for info in chunks] == [None, chunks[0].key, chunks[1].key]
    assert ends(chunks[1].marks) == [40, 64]
    assert [info.num_bytes for info in chunks] == [128, 128, 20]


def test_without_a_follow_up_the_answer_is_nobodys() -> None:
    first, other = with_blocks(0, 0, 40, 30), with_blocks(1, 0, 90)  # the same text, but nobody says it follows
    marker = marker_of(first, other)
    marker.turn(first)
    offered = {info.key for info in marker.chunks(first, 0)}
    assert offered & set(keys(marker.turn(other).prompt).values()) == {"b1001"}  # the first 32 tokens


def test_equal_prompts_are_equal_to_their_last_token_if_the_last_block_is_known() -> None:
    blocks = (*blocks_of(0, 40), 99)
    one, two = with_blocks(0, 0, 40, blocks=blocks), with_blocks(1, 1, 40, blocks=blocks)
    marker = marker_of(one, two)
    assert marker.turn(one).prompt == marker.turn(two).prompt


def test_sessions_share_what_their_first_blocks_share_up_to_a_multiple() -> None:
    one = with_blocks(0, 0, 80, blocks=blocks_of(0, 80, 3 * BLOCK))
    two = with_blocks(1, 1, 80, blocks=blocks_of(1, 80, 3 * BLOCK))
    marker = marker_of(one, two)
    mine, theirs = keys(marker.turn(one).prompt), keys(marker.turn(two).prompt)
    assert [end for end in mine if mine[end] == theirs[end]] == [32]


def test_tenants_share_nothing() -> None:
    one, two = (with_blocks(i, 0, 64, tenant=tenant) for i, tenant in enumerate(("a", "b")))
    marker = marker_of(one, two)
    assert not set(marker.turn(one).prompt) & set(marker.turn(two).prompt)


def test_a_shorter_follow_up_shares_the_prompt_only() -> None:
    """Its parent's answer was rewritten (reasoning cut out, say): there is no token of it that is surely the same."""
    first, second = with_blocks(0, 0, 40, 50), with_blocks(1, 0, 80, parent=0)
    marker = marker_of(first, second)
    marker.turn(first)
    offered = {info.key for info in marker.chunks(first, 0)}
    turn = marker.turn(second)
    assert ends(turn.prompt) == [32, 40, 64, 80]
    assert {mark.end for mark in turn.prompt if mark.key in offered} == {32}
    assert keys(turn.prompt)[40] == marker_of(first).turn(first).prompt[-1].key


def test_a_follow_up_that_leaves_its_history_shares_what_is_common() -> None:
    first = with_blocks(0, 0, 100, 10)
    second = with_blocks(1, 0, 130, parent=0, blocks=(*first.blocks[:4], *blocks_of(7, 130)[4:]))
    marker = marker_of(first, second)
    before, after = keys(marker.turn(first).prompt), keys(marker.turn(second).prompt)
    assert [end for end in after if after[end] == before.get(end)] == [32, 64]


def test_of_two_follow_ups_with_other_answers_one_has_the_answer_that_was_given() -> None:
    first = with_blocks(0, 0, 32, 40)
    second = with_blocks(1, 0, 90, parent=0)
    third = with_blocks(2, 0, 90, parent=0, blocks=(*first.blocks, *blocks_of(7, 90)[2:]))
    fourth = with_blocks(3, 0, 96, parent=0)
    marker = marker_of(first, second, third, fourth)
    marker.turn(first)
    offered = {info.key for info in marker.chunks(first, 0)}
    hits = [{mark.end for mark in marker.turn(one).prompt if mark.key in offered} for one in (second, third, fourth)]
    assert hits == [{32, 64, 71}, {32}, {32, 64, 71}]


def test_lengths_alone_are_private_to_the_chain() -> None:
    first, second, other = request(0, 40, 30), request(1, 90, 5, parent=0), request(2, 90)
    marker = marker_of(first, second, other, block_tokens=0)
    marker.turn(first)
    offered = {info.key for info in marker.chunks(first, 0)}
    assert offered < {mark.key for mark in marker.turn(second).prompt}
    assert not offered & {mark.key for mark in marker.turn(other).prompt}


def test_siblings_without_ids_share_their_history_and_no_more() -> None:
    first, second, third = request(0, 40, 30), request(1, 120, parent=0), request(2, 130, parent=0)
    marker = marker_of(first, second, third, block_tokens=0)
    marker.turn(first)
    one, two = keys(marker.turn(second).prompt), keys(marker.turn(third).prompt)
    assert [end for end in one if one[end] == two.get(end)] == [32, 40, 64, 69]


# --- context windows --------------------------------------------------------------------------------------------------


def truncated() -> tuple[Request, Request]:
    """150 tokens and an answer of 30 in session 0; then 100 tokens that share no block with them."""
    return with_blocks(0, 0, 150, 30), with_blocks(1, 0, 100, 5, parent=0, blocks=blocks_of(5, 100))


def test_a_truncated_context_is_new_text() -> None:
    first, second = truncated()
    marker = marker_of(first, second)
    marker.turn(first)
    offered = {info.key for info in marker.chunks(first, 0)}
    assert not offered & {mark.key for mark in marker.turn(second).prompt}
    assert marker.num_truncated(second) == 100
    assert marker.kept_chunks(first) == ()


def test_what_a_truncation_keeps_can_be_offered_under_its_keys() -> None:
    first, second = truncated()
    typed = with_blocks(2, 9, 30, 10), with_blocks(3, 9, 50, 1, parent=2)  # 10 tokens typed: the trace's mean
    marker = marker_of(first, second, *typed, reuse_after_truncation=True)
    marker.turn(first)
    kept = marker.kept_chunks(first)
    assert [(info.start, info.end) for info in kept] == [(0, 32), (32, 64), (64, 90)]
    wanted = keys(marker.turn(second).prompt)
    assert list(wanted) == [32, 64, 90, 96, 100]
    assert all(wanted[info.end] == info.key for info in kept)
    assert marker.num_truncated(second) == 0


# --- the chunks of all turns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_chunks_follow_each_other_and_carry_the_marks_inside_them(seed: int) -> None:
    trace = random_trace(seed)
    marker = Marker(trace, CHUNK, 4, reuse=True, reuse_after_truncation=False)
    position: dict[str, int] = {}  # every key stands for one prefix, so for one end
    for one in trace:
        turn = marker.turn(one)
        assert turn.prompt[-1].end == one.input_tokens
        whole = marker.chunks(one, 0)
        check_chunks(whole, one.input_tokens + one.output_tokens - 1)
        assert marker.chunks(one, 40)[0].start == 32
        assert marker.full_chunks(one, 0) == whole[: one.input_tokens // CHUNK]
        for mark in [mark for info in whole for mark in info.marks]:
            assert position.setdefault(mark.key, mark.end) == mark.end
        marker.ended(one)


def check_chunks(chunks: tuple[ChunkInfo, ...], end: int) -> None:
    assert [info.start for info in chunks] == list(range(0, end, CHUNK))
    assert chunks[-1].end == end
    for info, after in pairwise(chunks):
        assert after.parent == info.key
    for info in chunks:
        assert info.marks[-1] == Mark(info.end, info.key)
        assert ends(info.marks) == sorted(set(ends(info.marks)))
        assert info.start < info.marks[0].end


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [0, -32, 24])
def test_chunks_that_blocks_do_not_fit_into_are_refused(chunk_tokens: int) -> None:
    with pytest.raises(SetupError, match="chunk_tokens"):
        Marker(trace_of(block_tokens=BLOCK), chunk_tokens, 4, reuse=True, reuse_after_truncation=False)


@pytest.mark.parametrize(
    ("requests", "advice"),
    [
        ((request(0, 0),), "no input"),
        ((request(0, 5), request(0, 5)), "twice"),
        ((request(1, 5, parent=2), request(2, 5)), "before its parent"),
    ],
)
def test_traces_that_cannot_be_run_are_refused(requests: tuple[Request, ...], advice: str) -> None:
    with pytest.raises(TraceError, match=advice):
        marker_of(*requests)


def test_a_parent_that_the_trace_lacks_is_none() -> None:
    orphan = request(5, 40, parent=2)
    assert marker_of(orphan, block_tokens=0).parent_of(orphan) is None


def test_a_trace_without_requests_is_fine() -> None:
    assert Marker(Trace(name="none", block_tokens=0, requests=()), 32, 4, reuse=True, reuse_after_truncation=True)
