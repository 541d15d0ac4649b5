from __future__ import annotations

import pytest

import storage.memory
from storage.contract import TierContract, sample_chunk
from storage.memory import MemoryTier
from storage.tier import TierFull


class TestMemoryTier(TierContract):
    @pytest.fixture
    def tier(self):
        tier = MemoryTier(256 * 1024)
        yield tier
        tier.close()

    def break_writes(self, tier, monkeypatch):
        class Exhausted:
            def __len__(self):
                return 20_000

            def copy(self):
                raise MemoryError

        monkeypatch.setattr(storage.memory, "byte_view", lambda data: Exhausted())

    def test_what_it_lends_cannot_be_written_to(self, tier):
        key, data = sample_chunk(1, 20_000)
        tier.put(key, data)
        with pytest.raises(ValueError, match="read-only"):
            tier.read(key)[0] = 0

    def test_close_empties_it(self, tier):
        tier.put(*sample_chunk(1, 20_000))
        tier.close()
        assert (tier.used_bytes, tier.keys()) == (0, [])


def test_a_budget_must_be_positive():
    with pytest.raises(ValueError, match="at least one byte"):
        MemoryTier(0)


def test_full_says_what_to_do():
    with pytest.raises(TierFull, match="raise the budget"):
        MemoryTier(10).put(*sample_chunk(1, 0))
