from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from storage.contract import sample_layers
from storage.format import encode, read_chunk
from storage.recycle import STEP_BYTES, Recycler


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_the_last_view_is_gone():
    recycler = Recycler(limit_bytes=10 * STEP_BYTES)
    array = recycler.take(1000)
    first = address(array)
    view = array[10:20].view(np.uint16)
    buffer = memoryview(array)
    del array
    assert recycler.waiting_bytes == 0
    assert address(recycler.take(1000)) != first
    del view
    assert recycler.waiting_bytes == STEP_BYTES  # the other array's
    buffer.release()
    assert recycler.waiting_bytes == 2 * STEP_BYTES
    assert first in {address(recycler.take(900)) for _ in range(2)}


def test_sizes_are_exact_and_classes_apart():
    recycler = Recycler(limit_bytes=10 * STEP_BYTES)
    small, large = recycler.take(STEP_BYTES), recycler.take(STEP_BYTES + 1)
    assert (small.nbytes, large.nbytes) == (STEP_BYTES, STEP_BYTES + 1)
    assert small.flags.writeable
    del small, large
    assert recycler.waiting_bytes == 3 * STEP_BYTES
    assert recycler.take(2 * STEP_BYTES).nbytes == 2 * STEP_BYTES


def test_never_more_waits_than_the_limit():
    recycler = Recycler(limit_bytes=2 * STEP_BYTES)
    arrays = [recycler.take(STEP_BYTES) for _ in range(5)]
    arrays.clear()
    assert recycler.waiting_bytes == 2 * STEP_BYTES
    nothing = Recycler(limit_bytes=0)
    nothing.take(10)
    assert nothing.waiting_bytes == 0


def test_threads_never_share_memory():
    recycler = Recycler(limit_bytes=8 * STEP_BYTES)
    broken = []

    def work(number):
        for _ in range(200):
            array = recycler.take(STEP_BYTES)
            array[:: STEP_BYTES // 8] = number
            if not (array[:: STEP_BYTES // 8] == number).all():
                broken.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    assert recycler.waiting_bytes <= 8 * STEP_BYTES


@pytest.mark.parametrize("hold", ["reader", "layer", "array"])
def test_a_chunk_that_is_held_is_not_overwritten(hold):
    header, layers = sample_layers(1, 50_000)
    data = encode(header, layers)
    before = data.tobytes()
    reader = read_chunk(data)
    held = {"reader": reader, "layer": reader.layer(0), "array": data}[hold]
    del data, reader
    gc.collect()
    others = [encode(*sample_layers(seed, 50_000)) for seed in range(2, 12)]
    if hold == "layer":
        assert np.array_equal(held[0], layers[0][0])
    else:
        (held if hold == "reader" else read_chunk(held)).verify()
    if hold == "array":
        assert held.tobytes() == before
    del others
