from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.arrivals import Arrivals


class FakeFetch:
    def __init__(self, data):
        self.data, self.is_cancelled = data, False
        self.may_end = threading.Event()
        self.may_end.set()

    def result(self):
        assert self.may_end.wait(5.0)
        if isinstance(self.data, Exception):
            raise self.data
        return self.data

    def cancel(self):
        self.is_cancelled = True


class Place:
    """Gives the key's own bytes, `num_bytes` times, and remembers what it was asked."""

    def __init__(self):
        self.fetches = []
        self.now = 0.0
        self.error = None
        self.arrivals = Arrivals(self.begin, limit_bytes=100, keep_s=10.0, clock=lambda: self.now)

    def begin(self, key, num_bytes):
        self.fetches.append(FakeFetch(self.error or key.encode() * num_bytes))
        return self.fetches[-1]


@pytest.fixture
def place():
    return Place()


def test_an_expected_chunk_is_fetched_once_and_no_longer_counted_when_taken(place):
    place.arrivals.expect("a", 10)
    assert len(place.fetches) == 1
    assert place.arrivals.expected_bytes == 10
    assert place.arrivals.take("a", 10).data.tobytes() == b"a" * 10
    assert len(place.fetches) == 1
    assert place.arrivals.expected_bytes == 0


def test_the_size_need_not_be_said_again(place):
    assert place.arrivals.take("a") is None
    place.arrivals.expect("a", 10)
    assert place.arrivals.take("a").num_bytes == 10


def test_nothing_is_kept_of_what_was_taken(place):
    place.arrivals.expect("a", 10)
    place.arrivals.take("a")
    gc.collect()
    assert place.arrivals.take("a") is None
    place.arrivals.take("a", 10)
    assert len(place.fetches) == 2


def test_who_comes_while_it_is_held_shares_it(place):
    held = place.arrivals.take("a", 10)
    place.arrivals.expect("a", 10)
    assert place.arrivals.take("a", 10) is held
    assert len(place.fetches) == 1


def test_each_of_two_who_expect_it_takes_it(place):
    place.arrivals.expect("a", 10)
    place.arrivals.expect("a", 10)
    assert place.arrivals.expected_bytes == 10
    place.arrivals.take("a")
    gc.collect()
    assert place.arrivals.expected_bytes == 10
    place.arrivals.take("a")
    assert len(place.fetches) == 1
    assert place.arrivals.expected_bytes == 0


def test_the_last_one_to_forget_ends_the_fetch(place):
    place.arrivals.expect("a", 10)
    place.arrivals.expect("a", 10)
    place.arrivals.forget("a")
    assert not place.fetches[0].is_cancelled
    place.arrivals.forget("a")
    assert place.fetches[0].is_cancelled
    assert place.arrivals.expected_bytes == 0
    place.arrivals.forget("a")
    place.arrivals.take("a", 10)
    assert len(place.fetches) == 2


def test_a_fetch_that_somebody_waits_for_goes_on(place):
    place.arrivals.expect("a", 10)
    place.fetches[0].may_end.clear()
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(place.arrivals.take, "a", 10)
        while not place.arrivals._alive["a"].num_waiting:
            pass
        place.arrivals.forget("a")
        assert not place.fetches[0].is_cancelled
        place.fetches[0].may_end.set()
        assert taking.result(5.0).data.tobytes() == b"a" * 10


def test_beyond_the_limit_nothing_is_expected_but_everything_can_be_taken(place):
    for key in "abc":
        place.arrivals.expect(key, 40)
    assert len(place.fetches) == 2
    assert place.arrivals.expected_bytes == 80
    place.arrivals.take("c", 40)
    place.arrivals.take("huge", 1000)
    assert [fetch.is_cancelled for fetch in place.fetches] == [False] * 4
    place.arrivals.take("a", 40)
    place.arrivals.expect("d", 40)
    assert len(place.fetches) == 5


def test_what_nobody_takes_makes_room_after_a_while(place):
    for key in "ab":
        place.arrivals.expect(key, 50)
    place.now = 9.0
    place.arrivals.expect("b", 50)  # again: it counts from now
    place.now = 11.0
    place.arrivals.expect("c", 50)
    assert [fetch.is_cancelled for fetch in place.fetches] == [True, False, False]
    assert place.arrivals.expected_bytes == 100


def test_one_who_expects_another_size_does_not_spoil_it_for_others(place):
    place.arrivals.expect("a", 9)
    assert place.arrivals.take("a", 10).data.tobytes() == b"a" * 10


@pytest.mark.parametrize("is_expected", [False, True])
def test_a_failure_is_raised_and_the_next_one_tries_again(place, is_expected):
    place.error = OSError("no")
    if is_expected:
        place.arrivals.expect("a", 10)
    with pytest.raises(OSError, match="no"):
        place.arrivals.take("a", 10)
    assert place.arrivals.expected_bytes == 0
    place.error = None
    assert place.arrivals.take("a", 10).data.tobytes() == b"a" * 10
    assert len(place.fetches) == 2
