"""The policies that come along: their contracts, and what each of them promises beyond."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from policies.admission import AdmissionPolicy, Always
from policies.eviction import EvictionPolicy, Fifo, LookAhead, Lru
from policies.outlook import Outlook
from policies.placement import EarliestStart, LeastLoaded, PlacementPolicy
from policies.prefetch import LookAhead as PrefetchLookAhead
from policies.prefetch import Off, PrefetchPolicy
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
from tests.policies.texts import text, turn_of


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


class TestAlways(AdmissionContract):
    @pytest.fixture
    def policy(self) -> AdmissionPolicy:
        return Always()


def test_windows_of_the_paper() -> None:
    """CachedAttention, section 3.3: C_dram / S_kv and (C_dram + C_ssd) / S_kv."""
    outlook = Outlook(num_waiting=5, dram_budget_bytes=128, ssd_budget_bytes=1000, session_bytes=10.0)
    assert (outlook.prefetch_window, outlook.eviction_window) == (12, 112)
