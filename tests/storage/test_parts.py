"""Bytes in parts are the same bytes again: no copy where parts are neighbours, and alive as long as needed."""

import weakref

import numpy as np
import pytest

from storage.parts import PART_BYTES, in_parts, whole

SIZES = [1, 63, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 12_345]


def sample(size):
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_whole_again_without_a_copy(size):
    data = sample(size)
    data.flags.writeable = False
    parts = in_parts(data)
    assert all(len(part) <= PART_BYTES for part in parts)
    again = whole(parts)
    assert np.array_equal(again, data)
    assert np.shares_memory(again, data)
    assert not again.flags.writeable


def test_no_bytes_are_one_part():
    assert [len(part) for part in in_parts(b"")] == [0]
    assert len(whole(in_parts(b""))) == 0


@pytest.mark.parametrize("order", [(0, 2), (1, 0), (0, 0)])
def test_parts_that_are_no_neighbours_are_copied(order):
    parts = np.split(sample(3 * 64), 3)
    assert whole([parts[i] for i in order]).tobytes() == b"".join(parts[i].tobytes() for i in order)


def test_one_buffer_is_whole_as_it_is():
    data = sample(100)
    assert np.shares_memory(whole(data), data)
    assert whole(b"abc").tobytes() == b"abc"


class _Memory(np.ndarray):
    """An array that weak references may point to."""


def test_what_is_whole_keeps_its_parts_alive():
    data = np.zeros(2 * PART_BYTES, np.uint8).view(_Memory)
    alive = weakref.ref(data)
    again = whole([data[:PART_BYTES], data[PART_BYTES:]])
    view = again[5:10]
    del data, again
    assert alive() is not None
    assert view.tobytes() == bytes(5)
    del view
    assert alive() is None


@pytest.mark.parametrize("found", ["words", ["words"], [1], None])
def test_what_holds_no_bytes_is_told(found):
    with pytest.raises(ValueError, match="chunk bytes must be one contiguous buffer"):
        whole(found)
