"""The policies that come along: their contracts, and what each of them promises beyond."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from policies.admission import AdmissionPolicy, Always, Offer, ReturnProbability, SecondTouch
from policies.eviction import EvictionPolicy, Fifo, LookAhead, Lru
from policies.outlook import Outlook
from policies.placement import Affinity, EarliestStart, LeastLoaded, PlacementPolicy, RoundRobin, SessionAffinity
from policies.prefetch import LookAhead as PrefetchLookAhead
from policies.prefetch import LookAheadBudget, Off, PrefetchPolicy
from tests.policies.contracts import (
    DRAM,
    OUTLOOK,
    AdmissionContract,
    EvictionContract,
    Facts,
    PlacementContract,
    PrefetchContract,
    draw_option,
)
from tests.policies.texts import chunk_of, text, turn_of


class TestFifo(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return Fifo()

    def test_first_stored_first_out(self, policy: EvictionPolicy) -> None:
        for key, stored_at, last_used in (("b", 2.0, 2.0), ("a", 1.0, 9.0), ("c", 3.0, 3.0)):
            policy.add(DRAM, Facts(key, stored_at=stored_at, last_used=last_used))
        assert list(policy.victims(DRAM, 3, OUTLOOK)) == ["a", "b", "c"]


class TestLru(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return Lru()

    def test_least_recently_used_first(self, policy: EvictionPolicy) -> None:
        for key, last_used in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("a", 4.0)):
            policy.add(DRAM, Facts(key, last_used=last_used))
        assert list(policy.victims(DRAM, 3, OUTLOOK)) == ["b", "c", "a"]


class TestLookAhead(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return LookAhead()

    def test_outside_the_queue_first_then_from_its_tail(self, policy: EvictionPolicy) -> None:
        policy.add(DRAM, Facts("head", next_use=(0, 1)))
        policy.add(DRAM, Facts("tail", next_use=(0, 9)))
        policy.add(DRAM, Facts("last", next_use=(5, 2)))
        policy.add(DRAM, Facts("recent", last_used=8.0))
        policy.add(DRAM, Facts("old", last_used=2.0))
        assert list(policy.victims(DRAM, 5, OUTLOOK)) == ["old", "recent", "last", "tail", "head"]

    def test_the_window(self, policy: EvictionPolicy) -> None:
        """(1000 + 1000) / 100 bytes: 20 turns."""
        assert [policy.may_drop(Facts("a"), position, OUTLOOK) for position in (0, 19, 20)] == [False, False, True]

    def test_as_long_as_sizes_are_unknown_all_waiting_turns_are_inside(self, policy: EvictionPolicy) -> None:
        outlook = replace(OUTLOOK, session_bytes=0.0, num_waiting=3)
        assert [policy.may_drop(Facts("a"), position, outlook) for position in (2, 3)] == [False, True]


class TestPrefetchLookAhead(PrefetchContract):
    @pytest.fixture
    def policy(self) -> PrefetchPolicy:
        return PrefetchLookAhead()

    def test_the_window_is_what_dram_holds(self, policy: PrefetchPolicy) -> None:
        assert policy.window(OUTLOOK) == 10

    def test_nearest_need_first(self, policy: PrefetchPolicy) -> None:
        assert list(policy.choose(self.NEEDS)) == list(self.NEEDS)


class TestLookAheadBudget(PrefetchContract):
    @pytest.fixture
    def policy(self) -> PrefetchPolicy:
        return LookAheadBudget(bytes=100)

    def test_the_nearest_that_fit(self, policy: PrefetchPolicy) -> None:
        assert list(policy.choose(self.NEEDS)) == list(self.NEEDS[:2])

    def test_what_is_too_large_blocks_nobody(self, policy: PrefetchPolicy) -> None:
        large = replace(self.NEEDS[0], num_bytes=101)
        assert list(policy.choose((large, *self.NEEDS[1:]))) == list(self.NEEDS[1:3])

    def test_no_budget_no_window(self) -> None:
        assert LookAheadBudget(bytes=0).window(OUTLOOK) == 0
        with pytest.raises(ValueError, match="0 or more"):
            LookAheadBudget(bytes=-1)

    def test_so_many_bytes_a_second(self) -> None:
        """100 at once, then what has come together since."""
        policy = LookAheadBudget(bytes_per_s=sum(need.num_bytes for need in self.NEEDS[:2]))
        policy.window(replace(OUTLOOK, now=10.0))
        assert list(policy.choose(self.NEEDS)) == list(self.NEEDS[:2])
        policy.window(replace(OUTLOOK, now=10.0))
        assert list(policy.choose(self.NEEDS[:2])) == []
        policy.window(replace(OUTLOOK, now=11.0))
        assert list(policy.choose(self.NEEDS[:2])) == list(self.NEEDS[:2])
        assert LookAheadBudget(bytes_per_s=0).window(OUTLOOK) == 0


class TestOff(PrefetchContract):
    @pytest.fixture
    def policy(self) -> PrefetchPolicy:
        return Off()

    def test_nothing(self, policy: PrefetchPolicy) -> None:
        assert policy.window(OUTLOOK) == 0
        assert list(policy.choose(self.NEEDS)) == []


class TestLeastLoaded(PlacementContract):
    @pytest.fixture
    def policy(self) -> PlacementPolicy:
        return LeastLoaded()

    def test_shares_count_not_numbers(self, policy: PlacementPolicy) -> None:
        small = draw_option(Random(1), "small", num_running_turns=1, max_running_turns=2)
        large = draw_option(Random(1), "large", num_running_turns=2, max_running_turns=8)
        assert policy.choose(turn_of("a/1", text(1, 4)), [small, large]) == "large"


class TestEarliestStart(PlacementContract):
    @pytest.fixture
    def policy(self) -> PlacementPolicy:
        return EarliestStart()

    def test_the_kv_attracts_until_the_queue_there_is_too_long(self, policy: PlacementPolicy) -> None:
        cold = draw_option(
            Random(1), "cold", num_queued_tokens=0, num_reused_tokens=0, num_uncached_tokens=1000, load_s=0
        )
        warm = replace(cold, replica_id="warm", num_reused_tokens=900, num_uncached_tokens=100)
        turn = turn_of("a/1", text(1, 4))
        assert policy.choose(turn, [cold, replace(warm, num_queued_tokens=800)]) == "warm"
        assert policy.choose(turn, [cold, replace(warm, num_queued_tokens=1000)]) == "cold"

    def test_loading_counts(self, policy: PlacementPolicy) -> None:
        near = draw_option(Random(1), "near", load_s=0)
        far = replace(near, replica_id="far", load_s=0.5)
        assert policy.choose(turn_of("a/1", text(1, 4)), [far, near]) == "near"

    def test_of_equals_the_one_with_an_affinity_unless_it_is_much_busier(self, policy: PlacementPolicy) -> None:
        idle = draw_option(Random(1), "idle", num_running_turns=0, max_running_turns=8)
        liked = replace(idle, replica_id="liked", num_running_turns=2, affinity=Affinity.HINTED)
        turn = turn_of("a/1", text(1, 4))
        assert policy.choose(turn, [idle, liked]) == "liked"
        assert policy.choose(turn, [idle, replace(liked, num_running_turns=3)]) == "idle"
        assert policy.choose(turn, [idle, replace(liked, load_s=liked.load_s + 0.1)]) == "idle"
        before = replace(liked, replica_id="before", affinity=Affinity.SESSION)
        assert policy.choose(turn, [idle, liked, before]) == "before"


class TestRoundRobin(PlacementContract):
    @pytest.fixture
    def policy(self) -> PlacementPolicy:
        return RoundRobin()

    def test_an_idle_replica_is_better_than_a_busy_one(self, policy: PlacementPolicy) -> None:
        """Not here: whose turn it is does not depend on load."""
        idle, busy = (
            draw_option(Random(0), "r1", num_running_turns=0),
            draw_option(Random(0), "r0", num_running_turns=3),
        )
        assert policy.choose(turn_of("a/1", text(1, 10)), [busy, idle]) == "r0"

    def test_one_after_the_other(self, policy: PlacementPolicy) -> None:
        options = [draw_option(Random(1), f"r{number}") for number in range(3)]
        chosen = [policy.choose(turn_of(f"a/{number}", text(1, 4)), options) for number in range(4)]
        assert chosen == ["r0", "r1", "r2", "r0"]
        assert policy.choose(turn_of("b/1", text(1, 4)), options[::2]) == "r2", "r1 is full"


class TestSessionAffinity(PlacementContract):
    @pytest.fixture
    def policy(self) -> PlacementPolicy:
        return SessionAffinity()

    def test_an_idle_replica_is_better_than_a_busy_one(self, policy: PlacementPolicy) -> None:
        """Only for who is not at home."""
        options = [draw_option(Random(0), f"r{number}", num_running_turns=number) for number in range(3)]
        turn = turn_of("a/1", text(1, 10))
        home = policy.choose(turn, options)
        others = [option for option in options if option.replica_id != home]
        assert policy.choose(turn, others) == others[0].replica_id
        assert policy.choose(turn, options) == home

    def test_when_a_replica_comes_only_those_move_that_move_to_it(self, policy: PlacementPolicy) -> None:
        options = [draw_option(Random(0), f"r{number}") for number in range(5)]
        turns = [turn_of(f"s{number}/1", text(1, 4)) for number in range(200)]
        before = [policy.choose(turn, options[:4]) for turn in turns]
        after = [policy.choose(turn, options) for turn in turns]
        assert {new for old, new in zip(before, after) if new != old} == {"r4"}
        assert all(20 < before.count(option.replica_id) < 80 for option in options[:4])

    def test_a_replica_that_is_gone_is_forgotten(self) -> None:
        policy = SessionAffinity(forget_after=10)
        options = [draw_option(Random(0), f"r{number}", num_running_turns=number) for number in range(3)]
        turns = [turn_of(f"s{number}/1", text(1, 4)) for number in range(300)]
        policy.choose(turns[0], options)
        left = [policy.choose(turn, options[1:]) for turn in turns[20:]]
        assert 100 < left.count("r2") < 180, "not all with the least loaded"


class TestAlways(AdmissionContract):
    @pytest.fixture
    def policy(self) -> AdmissionPolicy:
        return Always()


def offer_of(session_id: str, name: int = 1, *, is_awaited: bool = False) -> Offer:
    return Offer(session_id=session_id, chunk=chunk_of(text(name, 4), 0), is_awaited=is_awaited, dram_fill=0.5)


class TestSecondTouch(AdmissionContract):
    @pytest.fixture
    def policy(self) -> AdmissionPolicy:
        return SecondTouch(max_keys=2)

    def test_offered_before(self, policy: AdmissionPolicy) -> None:
        assert [policy.admit(offer_of("s", name), OUTLOOK) for name in (1, 2, 1, 2)] == [False, False, True, True]

    def test_memory_is_bounded(self, policy: AdmissionPolicy) -> None:
        assert [policy.admit(offer_of("s", name), OUTLOOK) for name in (1, 2, 3, 1)] == [False] * 4


class TestReturnProbability(AdmissionContract):
    @pytest.fixture
    def policy(self) -> AdmissionPolicy:
        return ReturnProbability(threshold=0.5, within_s=100.0, min_turns=50)

    def test_it_learns_that_first_turns_rarely_come_back_and_second_ones_do(self, policy: AdmissionPolicy) -> None:
        def admit(session_id: str, now: float, *, is_awaited: bool = False) -> bool:
            return policy.admit(offer_of(session_id, is_awaited=is_awaited), replace(OUTLOOK, now=now))

        assert admit("first", 0.0), "all is saved until enough was seen"
        for number in range(600):
            now = 10.0 * number
            if number % 5 == 0:
                for later in range(5):
                    admit(f"long{number // 5}", now + later * 2.0)
            else:
                admit(f"short{number}", now)
        assert not admit("new", 6001.0)
        assert admit("new", 6001.5, is_awaited=True)
        assert admit("new", 6005.0), "its second turn"


def test_windows_of_the_paper() -> None:
    """CachedAttention, section 3.3: C_dram / S_kv and (C_dram + C_ssd) / S_kv."""
    outlook = Outlook(num_waiting=5, dram_budget_bytes=128, ssd_budget_bytes=1000, session_bytes=10.0)
    assert (outlook.prefetch_window, outlook.eviction_window) == (12, 112)
