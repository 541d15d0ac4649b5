"""Generators: deterministic, sound, and like what they say they are like."""

from __future__ import annotations

from collections import Counter
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.simulator.generators import GENERATORS, make_trace, mix
from policies.simulator.generators.chat import Chat
from policies.simulator.readers import read_trace
from policies.simulator.trace import Trace
from tests.simulator.invariants import by_id, check, extends, num_common, shared_data

SMALL = {
    "agents": ",max_context_tokens=15000,mean_steps=9",
    "scan": ",scan_tokens=300,scans_per_s=0.1",
}
SPECS = st.builds(
    lambda name, *numbers: "{0}:sessions={2},seed={3},block_tokens={4}{1}".format(name, SMALL.get(name, ""), *numbers),
    st.sampled_from(sorted(GENERATORS)),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([7, 64, 500]),
)


def sessions(trace: Trace) -> Counter[int]:
    return Counter(request.session_id for request in trace)


@given(SPECS)
@settings(max_examples=50, deadline=None)
def test_what_holds_of_every_trace(spec: str) -> None:
    trace = make_trace(spec)
    check(trace)
    assert trace == make_trace(spec)
    requests, size = by_id(trace), trace.block_tokens
    for request in trace:
        assert len(request.blocks) == -(-request.input_tokens // size)
        parent = requests.get(-1 if request.parent is None else request.parent)
        if parent is not None and not spec.startswith(("chat", "scan", "edits")):  # truncated, or edited
            assert extends(request, parent, size)
            assert request.input_tokens > parent.input_tokens


@given(SPECS, SPECS)
@settings(max_examples=10, deadline=None)
def test_another_seed_is_another_trace(one: str, two: str) -> None:
    assert (make_trace(one) == make_trace(two)) == (one == two)


# --- one by one -------------------------------------------------------------------------------------------------------


def test_chat_has_the_figures_of_sharegpt() -> None:
    trace = make_trace("chat:sessions=2000,seed=1")
    counts = sessions(trace).values()
    assert mean(counts) == pytest.approx(5.75, abs=0.35)
    assert sum(count == 1 for count in counts) / len(counts) == pytest.approx(0.27, abs=0.03)
    starts = [request.arrival_s for request in trace if request.parent is None]
    assert len(starts) / starts[-1] == pytest.approx(1.0, rel=0.1)
    thoughts = [request.think_s for request in trace if request.think_s is not None]
    assert mean(thoughts) == pytest.approx(60, rel=0.1)


def test_chat_is_like_the_shared_trace_made_from_the_same_paper() -> None:
    theirs = read_trace(shared_data("traces", "sharegpt_like_generated.parquet"))
    ours = make_trace("chat:sessions=3000")

    def figures(trace: Trace) -> list[float]:
        return [mean(request.input_tokens for request in trace), mean(request.output_tokens for request in trace)]

    assert figures(ours) == pytest.approx(figures(theirs), rel=0.1)


def test_a_window_leaves_half_of_it_and_no_old_block() -> None:
    trace = make_trace("chat:sessions=300,seed=2,window_tokens=1024,block_tokens=16")
    parents, num_truncated = by_id(trace), 0
    for request in trace:
        parent = None if request.parent is None else parents[request.parent]
        fits = request.input_tokens + request.output_tokens <= 1024
        if parent is not None and not extends(request, parent, 16):
            num_truncated += 1
            assert num_common(request, parent) == 0
            assert request.input_tokens >= 512
        elif parent is not None:
            assert fits or request.input_tokens <= 512
    assert num_truncated > 50
    assert Counter(request.input_tokens for request in trace).most_common(1)[0][0] == 512


def test_popular_prefixes_are_shared_most() -> None:
    trace = make_trace("zipf:sessions=2000,prefixes=20,exponent=1.2,mean_turns=1,seed=3,block_tokens=16")
    shares = sorted(Counter(request.blocks[0] for request in trace).values(), reverse=True)
    assert len(shares) == 20
    harmonic = [1 / k**1.2 for k in range(1, 21)]
    assert [count / 2000 for count in shares[:3]] == pytest.approx(
        [share / sum(harmonic) for share in harmonic[:3]], abs=0.05
    )
    flat = make_trace("zipf:sessions=2000,prefixes=20,exponent=0,mean_turns=1,seed=3,block_tokens=16")
    assert max(Counter(request.blocks[0] for request in flat).values()) < 2 * 2000 / 20


def test_agents_only_ever_append_and_wait_for_tools() -> None:
    trace = make_trace("agents:sessions=30,seed=4,max_context_tokens=60000")
    assert max(request.input_tokens for request in trace) <= 60_000
    shared = {tuple(request.blocks[: 8000 // 512]) for request in trace}
    assert len(shared) == 1
    pauses = sorted(request.think_s for request in trace if request.think_s is not None)
    assert pauses[len(pauses) // 2] == pytest.approx(10, abs=3)
    assert pauses[-1] > 600
    assert make_trace("agents:sessions=30,seed=4,pause_share=0").duration_s < trace.duration_s


def test_a_flood_is_never_seen_again_and_leaves_the_chat_as_it_was() -> None:
    trace, chat = make_trace("scan:sessions=200,seed=5,scans_per_s=2"), make_trace("chat:sessions=200,seed=5")
    flood_ids = set(sessions(trace)) - {request.session_id for request in trace if request.parent is not None}
    seen = Counter(block for request in trace for block in request.blocks)
    long = [request for request in trace if request.input_tokens > 4096]
    assert len(long) > 300
    assert {request.session_id for request in long} <= flood_ids
    assert all(seen[block] == 1 for request in long for block in request.blocks)
    share = [(request.arrival_s - chat.requests[0].arrival_s) / chat.duration_s for request in long]
    assert 0.25 <= min(share) < max(share) <= 0.75
    kept = {request.arrival_s for request in trace}
    assert all(request.arrival_s in kept for request in chat)


@pytest.mark.parametrize(("inside_share", "inside"), [(0, False), (1, True)])
def test_branches_part_where_they_should(inside_share: int, inside: bool) -> None:
    trace = make_trace(f"branches:sessions=60,seed=6,branch_share=0.5,inside_share={inside_share},block_tokens=16")
    requests = by_id(trace)
    children: dict[int, list[int]] = {}
    for request in trace:
        if request.parent is not None:
            children.setdefault(request.parent, []).append(request.request_id)
    branching = {parent: ids for parent, ids in children.items() if len(ids) > 1}
    assert len(branching) > 30
    for parent_id, ids in branching.items():
        assert len(ids) == 3
        end = requests[parent_id].input_tokens + requests[parent_id].output_tokens
        assert (end % 16 != 0) == inside
        assert {num_common(requests[ids[0]], requests[other]) for other in ids[1:]} == {end // 16}


def test_retries_are_the_same_prompt_shortly_after() -> None:
    trace = make_trace("retries:sessions=200,seed=7,retry_share=0.3")
    turns: dict[tuple[int, int], list[int]] = {}
    requests = by_id(trace)
    for request in trace:
        turns.setdefault((request.session_id, request.turn), []).append(request.request_id)
    repeated = [ids for ids in turns.values() if len(ids) > 1]
    assert len(repeated) / len(turns) == pytest.approx(0.3, abs=0.05)
    for ids in repeated:
        first, *later = (requests[request_id] for request_id in ids)
        assert len(ids) <= 3
        assert all((other.blocks, other.parent) == (first.blocks, first.parent) for other in later)
        followers = {request.parent for request in trace.requests if request.parent in ids}
        assert followers <= {ids[-1]}
    gaps = [requests[ids[1]].arrival_s - requests[ids[0]].arrival_s for ids in repeated]
    assert 3 < mean(gaps) < 8


def test_an_edit_keeps_only_what_comes_before_it() -> None:
    trace = make_trace("edits:sessions=300,seed=8,edit_share=0.3,block_tokens=16")
    requests = by_id(trace)
    pairs = [(request, requests[request.parent]) for request in trace if request.parent is not None]
    edited = [(child, parent) for child, parent in pairs if not extends(child, parent, 16)]
    assert len(edited) / len(pairs) == pytest.approx(0.3, abs=0.06)
    assert all(child.input_tokens > parent.input_tokens + parent.output_tokens for child, parent in pairs)
    assert {num_common(child, parent) > 0 for child, parent in edited} == {True, False}
    untouched = make_trace("edits:sessions=50,edit_share=0,block_tokens=16")
    parents = by_id(untouched)
    assert all(extends(child, parents[child.parent], 16) for child in untouched if child.parent is not None)


# --- mixes ------------------------------------------------------------------------------------------------------------


def test_a_mix_holds_all_and_shares_nothing() -> None:
    one, two = make_trace("chat:sessions=20,seed=1"), make_trace("zipf:sessions=20,seed=1")
    mixed = mix([one, two, one])
    check(mixed)
    assert [request.request_id for request in mixed] == list(range(len(mixed)))
    assert mixed.input_tokens == 2 * one.input_tokens + two.input_tokens
    assert mixed.footprint_tokens == 2 * one.footprint_tokens + two.footprint_tokens
    assert len(sessions(mixed)) == 60
    assert (
        make_trace("chat:sessions=20,seed=1+zipf:sessions=20,seed=1+chat:sessions=20,seed=1").requests == mixed.requests
    )


def test_blocks_of_two_sizes_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"chat has 64, agents has 512.*coarser"):
        make_trace("chat:sessions=2+agents:sessions=1")
    with pytest.raises(ValueError, match="there are no traces"):
        mix([])


# --- specs ------------------------------------------------------------------------------------------------------------


def test_a_spec_is_its_dataclass() -> None:
    assert (
        make_trace(" chat : sessions = 7 , seed=3,mean_think_s=1e+1")
        == Chat(sessions=7, seed=3, mean_think_s=10.0).trace()
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chatter", "unknown trace 'chatter': choose one of agents, branches, chat, "),
        ("", "unknown trace ''"),
        ("chat:users=3", "unknown parameter 'users'; it takes sessions=1000, seed=0, "),
        ("chat:sessions", "'sessions' is not parameter=value; it takes "),
        ("chat:sessions=many", "sessions is 'many': give a whole number, for example 1000"),
        ("chat:sessions=1.5", "sessions is '1.5': give a whole number"),
        ("chat:sessions=1,sessions=2", "sessions is given twice"),
        ("chat:sessions=0", "sessions is 0: choose 1 or more"),
        ("chat:mean_turns=nan", "mean_turns is nan"),
        ("chat:sessions_per_s=inf", "sessions_per_s is inf: choose a number above 0"),
        ("agents:pause_share=2", "pause_share is 2.0: choose a share between 0 and 1"),
        ("scan:begin_share=0.8", "end_share is 0.75: choose more than begin_share, 0.8"),
        ("scan:sessions=0", "sessions is 0"),
        ("zipf:block_tokens=0", "block_tokens is 0"),
        ("retries:mean_retry_s=-1", "mean_retry_s is -1.0"),
    ],
)
def test_a_wrong_spec_says_what_is_known(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - compared below
        make_trace(spec)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
