"""The classical orders of caches beyond LRU: their contract, and what each of them promises beyond."""

from __future__ import annotations

import pytest

from policies.eviction import EvictionPolicy, Gdsf, Lfu, S3Fifo, Sieve
from tests.policies.contracts import DRAM, OUTLOOK, EvictionContract, Facts


class TestLfu(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return Lfu(half_life_s=10.0)

    def test_uses_count_half_after_a_half_life(self, policy: EvictionPolicy) -> None:
        policy.add(DRAM, Facts("thrice", last_used=0.0, num_uses=3))
        policy.add(DRAM, Facts("once", last_used=10.0))
        assert list(policy.victims(DRAM, 2, OUTLOOK)) == ["once", "thrice"]  # 1 use against 1.5
        policy.add(DRAM, Facts("later", last_used=20.0))
        assert list(policy.victims(DRAM, 3, OUTLOOK)) == ["once", "thrice", "later"]  # 0.5, 0.75, 1

    def test_uses_outlive_eviction(self, policy: EvictionPolicy) -> None:
        policy.add(DRAM, Facts("a", last_used=1.0, num_uses=4))
        policy.remove(DRAM, "a", evicted=True)
        policy.add(DRAM, Facts("b", last_used=2.0, num_uses=2))
        policy.add(DRAM, Facts("a", last_used=2.0, num_uses=1))
        assert list(policy.victims(DRAM, 2, OUTLOOK)) == ["b", "a"]

    def test_the_end_of_the_century_is_no_trouble(self, policy: EvictionPolicy) -> None:
        policy.add(DRAM, Facts("a", last_used=4e9))
        policy.add(DRAM, Facts("b", last_used=4e9 + 1))
        assert list(policy.victims(DRAM, 2, OUTLOOK)) == ["a", "b"]


class TestGdsf(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return Gdsf(attention_tokens=100.0)

    def test_equals_go_deepest_first(self, policy: EvictionPolicy) -> None:
        """Chunks at different depths are no equals, for the deeper costs more: unless attention is left out."""
        super().test_equals_go_deepest_first(Gdsf(attention_tokens=float("inf")))

    def test_uses_cost_and_size(self, policy: EvictionPolicy) -> None:
        policy.add(DRAM, Facts("plain"))
        policy.add(DRAM, Facts("large", num_bytes=80))
        policy.add(DRAM, Facts("deep", start=100, end=104))
        policy.add(DRAM, Facts("popular", num_uses=5))
        assert list(policy.victims(DRAM, 4, OUTLOOK)) == ["large", "plain", "deep", "popular"]

    def test_what_is_not_used_is_overtaken(self, policy: EvictionPolicy) -> None:
        policy.add(DRAM, Facts("idol", num_uses=3))
        gone: list[str] = []
        for number in range(5):
            policy.add(DRAM, Facts(f"new{number}", last_used=number))
            gone += policy.victims(DRAM, 1, OUTLOOK)
            policy.remove(DRAM, gone[-1], evicted=True)
        assert gone[:2] == ["new0", "new1"]
        assert "idol" in gone

    def test_a_lease_without_a_use_is_no_use(self, policy: EvictionPolicy) -> None:
        policy.add(DRAM, Facts("old", last_used=1.0))
        policy.add(DRAM, Facts("gone", last_used=1.0, num_bytes=80))
        policy.remove(DRAM, "gone", evicted=True)
        policy.remove(DRAM, "old", evicted=False)
        policy.add(DRAM, Facts("young", last_used=2.0))
        policy.add(DRAM, Facts("old", last_used=1.0))
        assert list(policy.victims(DRAM, 2, OUTLOOK)) == ["old", "young"]


class TestSieve(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return Sieve()

    def test_the_hand_spares_what_was_used_once(self, policy: EvictionPolicy) -> None:
        for key, last_used in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("a", 4.0)):
            policy.add(DRAM, Facts(key, last_used=last_used))
        assert list(policy.victims(DRAM, 3, OUTLOOK)) == ["b", "c", "a"]
        policy.remove(DRAM, "b", evicted=True)
        policy.add(DRAM, Facts("d", last_used=5.0))
        assert list(policy.victims(DRAM, 3, OUTLOOK)) == ["c", "d", "a"], "the hand has passed a"

    def test_a_lease_keeps_the_place_in_the_queue(self, policy: EvictionPolicy) -> None:
        for key, last_used in (("a", 1.0), ("b", 2.0)):
            policy.add(DRAM, Facts(key, last_used=last_used))
        policy.remove(DRAM, "a", evicted=False)
        policy.add(DRAM, Facts("a", last_used=1.0))
        assert list(policy.victims(DRAM, 2, OUTLOOK)) == ["a", "b"]


class TestS3Fifo(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return S3Fifo()

    def test_two_uses_on_probation_open_the_main_queue(self, policy: EvictionPolicy) -> None:
        for key, last_used in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("a", 4.0), ("a", 5.0), ("b", 6.0)):
            policy.add(DRAM, Facts(key, last_used=last_used))
        assert list(policy.victims(DRAM, 3, OUTLOOK)) == ["b", "c", "a"]

    def test_a_ghost_that_comes_back_is_not_on_probation(self, policy: EvictionPolicy) -> None:
        for key in "abc":
            policy.add(DRAM, Facts(key, last_used=1.0))
        policy.remove(DRAM, "a", evicted=True)
        policy.remove(DRAM, "b", evicted=False)
        policy.add(DRAM, Facts("a", last_used=2.0))
        policy.add(DRAM, Facts("b", last_used=3.0))
        policy.add(DRAM, Facts("d", last_used=4.0))
        assert list(policy.victims(DRAM, 4, OUTLOOK)) == ["b", "c", "d", "a"]

    @pytest.mark.parametrize("options", [{"small_share": 0.0}, {"small_share": 1.0}, {"hits_to_move": 4}])
    def test_options_that_make_no_sense(self, options: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="S3Fifo takes"):
            S3Fifo(**options)  # type: ignore[arg-type]
