from __future__ import annotations

import threading

import pytest

from storage.account import Account
from storage.tier import TierFull


def test_a_failed_write_returns_its_bytes():
    account = Account(100)
    with pytest.raises(OSError, match="disk"), account.adding("a", 60):
        raise OSError("disk")
    assert (account.used_bytes, account.keys(), account.get("a")) == (0, [], None)


def test_a_chunk_counts_as_kept_only_when_it_is_written():
    account = Account(100)
    with account.adding("a", 60) as is_new:
        assert is_new
        assert (account.get("a"), account.used_bytes) == (None, 60)
        with pytest.raises(TierFull, match="40 of the budget of 100"), account.adding("b", 41):
            pass
    assert account.get("a") == 60
    with account.adding("a", 60) as is_new:
        assert not is_new
    assert account.used_bytes == 60


def test_admitting_takes_a_reservation_over_or_gives_it_back():
    account = Account(100)
    account.reserve(60)
    with account.admitting("a", 60) as is_new:
        assert is_new
    account.reserve(40)
    with account.admitting("a", 40) as is_new:
        assert not is_new
    assert account.used_bytes == 60


def test_what_others_took_away_is_added_again():
    account = Account(100)
    with account.adding("a", 60):
        pass
    with account.adding("a", 70, lambda: False) as is_new:
        assert is_new
    assert (account.get("a"), account.used_bytes) == (70, 70)


def test_a_failed_removal_keeps_the_bytes_counted():
    account = Account(100)
    with account.adding("a", 60):
        pass
    with pytest.raises(OSError, match="disk"), account.removing("a"):
        raise OSError("disk")
    assert account.used_bytes == 60
    with account.removing("a") as was_kept:
        assert was_kept
    assert account.used_bytes == 0


def test_a_reader_that_came_too_early_does_not_uncount_a_new_chunk():
    """A reader misses the file, then a writer commits it, then the reader reports the miss."""
    account = Account(100)
    written = threading.Event()
    with account.adding("a", 60):
        reader = threading.Thread(target=account.forget_unless, args=("a", written.is_set))
        reader.start()
        written.set()
    reader.join(5)
    assert account.get("a") == 60
    account.forget_unless("a", lambda: False)
    assert account.used_bytes == 0


def test_releasing_too_much_is_our_own_bug():
    with pytest.raises(AssertionError):
        Account(100).release(1)
