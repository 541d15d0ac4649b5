"""Traces made of traces."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.simulator.generators import make_trace
from policies.simulator.readers import read_trace
from policies.simulator.shaping import coarser, first, scaled_arrivals, split, with_private_blocks
from policies.simulator.trace import Request, Trace
from tests.simulator.invariants import by_id, check, check_blocks, extends, num_common, shared_data

_EARLIER = make_trace("chat:sessions=60,seed=1,block_tokens=16")
CHAT = replace(_EARLIER, requests=tuple(replace(request, arrival_s=request.arrival_s + 900) for request in _EARLIER))


def lengths_only(trace: Trace) -> Trace:
    return replace(trace, block_tokens=0, requests=tuple(replace(request, blocks=()) for request in trace))


def pair(first_tokens: int, output_tokens: int, second_tokens: int) -> Trace:
    """A turn and its follow-up, lengths only."""
    one = Request(request_id=4, session_id=1, arrival_s=0.0, input_tokens=first_tokens, output_tokens=output_tokens)
    two = replace(one, request_id=9, arrival_s=1.0, input_tokens=second_tokens, turn=1, parent=4)
    return Trace(name="pair", block_tokens=0, requests=(one, two))


# --- fewer, sooner ----------------------------------------------------------------------------------------------------


def test_the_first_requests_are_a_trace() -> None:
    some = first(CHAT, 50)
    check(some)
    assert some.requests == CHAT.requests[:50]
    assert len(first(CHAT, 10**6)) == len(CHAT)
    with pytest.raises(ValueError, match="choose 1 or more"):
        first(CHAT, 0)


@given(st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_a_split_is_by_time_and_loses_nothing(share: float) -> None:
    train, held_out = split(CHAT, share)
    check(train)
    requests = by_id(held_out)
    assert train.requests == CHAT.requests[: len(train)]
    assert [request.request_id for request in held_out] == [request.request_id for request in CHAT][len(train) :]
    cut_s = CHAT.requests[0].arrival_s + share * CHAT.duration_s
    assert train.requests[-1].arrival_s < cut_s <= held_out.requests[0].arrival_s
    for request, before in zip(held_out, CHAT.requests[len(train) :]):
        kept = before.parent in requests or before.parent is None
        assert request == (before if kept else replace(before, parent=None, think_s=None))


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_no_split_has_an_empty_part(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        split(CHAT, share)
    with pytest.raises(ValueError, match="without requests"):
        split(first(CHAT, 1), 0.5)


def test_arrivals_are_scaled_from_the_first_one() -> None:
    sooner = scaled_arrivals(CHAT, 0.5)
    check(sooner)
    assert sooner.requests[0].arrival_s == CHAT.requests[0].arrival_s
    assert sooner.duration_s == pytest.approx(CHAT.duration_s / 2)
    assert [request.think_s for request in sooner] == [request.think_s for request in CHAT]
    with pytest.raises(ValueError, match="factor is 0"):
        scaled_arrivals(CHAT, 0)


# --- private blocks ---------------------------------------------------------------------------------------------------


@given(
    first_tokens=st.integers(1, 100),
    output_tokens=st.integers(0, 100),
    second_tokens=st.integers(1, 300),
    size=st.integers(1, 32),
)
def test_a_follow_up_extends_its_parent_if_it_is_long_enough(
    first_tokens: int, output_tokens: int, second_tokens: int, size: int
) -> None:
    trace = with_private_blocks(pair(first_tokens, output_tokens, second_tokens), size)
    check(trace)
    parent, child = trace.requests
    assert len(child.blocks) == -(-second_tokens // size)
    if second_tokens >= first_tokens:
        assert extends(child, parent, size)
        assert num_common(child, parent) <= -(-first_tokens // size)
    else:
        assert num_common(child, parent) == 0


def test_follow_ups_of_one_parent_share_its_answer() -> None:
    trace = pair(32, 64, 200)
    sibling = replace(trace.requests[1], request_id=10)
    blocks = with_private_blocks(replace(trace, requests=(*trace.requests, sibling)), 16).requests
    assert num_common(blocks[1], blocks[2]) == (32 + 64) // 16
    assert num_common(blocks[0], blocks[1]) == 2


def test_strangers_share_nothing_and_blocks_are_not_replaced() -> None:
    trace = with_private_blocks(lengths_only(first(CHAT, 30)), 8)
    by_session: dict[int, set[int]] = {}
    for request in trace:
        by_session.setdefault(request.session_id, set()).update(request.blocks)
    assert sum(map(len, by_session.values())) == len(set().union(*by_session.values()))
    with pytest.raises(ValueError, match="blocks of 16 tokens already"):
        with_private_blocks(CHAT, 16)


# --- coarser blocks ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_coarse_blocks_say_what_the_fine_ones_said(num_merged: int) -> None:
    coarse = coarser(CHAT, 16 * num_merged)
    check(coarse)
    assert coarse.block_tokens == 16 * num_merged
    for request, fine in zip(coarse, CHAT):
        assert len(request.blocks) == -(-fine.input_tokens // (16 * num_merged))
        assert list(request.blocks[:-1]) == list(
            fine.blocks[num_merged - 1 : -1 : num_merged][: len(request.blocks) - 1]
        )
        assert request.blocks[-1] == fine.blocks[-1]
    fine_of, coarse_of = by_id(CHAT), by_id(coarse)
    for fine in CHAT:
        if fine.parent is not None:
            num_fine = num_common(fine, fine_of[fine.parent])
            num_coarse = num_common(coarse_of[fine.request_id], coarse_of[fine.parent])
            assert num_coarse == num_fine // num_merged


def test_a_tail_that_the_fine_blocks_leave_out_stays_out() -> None:
    whole = Request(request_id=0, session_id=0, arrival_s=0.0, input_tokens=70, output_tokens=1, blocks=range(5))
    for blocks, merged in ((range(5), [1, 3, 4]), (range(4), [1, 3])):
        trace = Trace(name="t", block_tokens=16, requests=(replace(whole, blocks=blocks),))
        assert list(coarser(trace, 32).requests[0].blocks) == merged


@pytest.mark.parametrize("size", [8, 24, 0])
def test_only_multiples_are_coarser(size: int) -> None:
    with pytest.raises(ValueError, match="choose a multiple"):
        coarser(CHAT, size)


def test_without_blocks_nothing_is_coarser() -> None:
    with pytest.raises(ValueError, match="with_private_blocks"):
        coarser(lengths_only(CHAT), 64)


def test_a_real_trace_gets_coarser() -> None:
    trace = read_trace(shared_data("traces", "miniswe_b64approx.parquet"))
    coarse = coarser(trace, 256)
    check_blocks(coarse)
    for request in coarse:
        is_whole = request.input_tokens % 64 == 0 and request.input_tokens % 256 > 0
        assert len(request.blocks) == request.input_tokens // 256 + is_whole
    assert coarse.footprint_tokens <= trace.footprint_tokens
