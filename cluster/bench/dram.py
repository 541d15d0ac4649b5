"""Saving to and loading from Ray's object store, and the parts of both, beside plain memcpy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from cluster.bench.kv import Bytes, TurnKV
from cluster.bench.timing import Case, Samples, drain, each, side_by_side
from storage.format import read_chunk
from storage.framing import checksum
from storage.parts import in_parts, whole

OBJECT_STORE_BYTES = 512 << 20
TOUCH_SHARE = 0.8  # of the object store, filled once: the first touch of its pages runs at a tenth of the speed
SMALL_OBJECT_BYTES = 128 << 10  # the smallest that Ray keeps in the store and not inside the reference
FREE_S = 0.5  # until a dropped object's pages are free again
NUM_EXPORTS = 2  # threads of a shard that serve exports


class Exporter:
    """What a shard does to save: one thread encodes, exports wait for it. Becomes a threaded actor."""

    def __init__(self, turn: TurnKV) -> None:
        self._turn = turn
        self._saver = ThreadPoolExecutor(1)

    def begin(self) -> None:
        """Hands all chunks to the saver."""
        self._futures = [self._saver.submit(self._turn.encode, i) for i in range(len(self._turn.chunks))]

    def saved(self, i: int) -> list[Bytes]:
        return in_parts(self._futures[i].result())

    def export(self, i: int) -> list[Bytes]:
        return in_parts(self._turn.chunks[i])

    def fill(self, num_bytes: int) -> Bytes:
        return np.ones(num_bytes, np.uint8)


@contextmanager
def local_ray() -> Iterator[int]:
    """Yields the bytes of the object store that may be filled: of one that runs already, none."""
    import ray

    from cluster.bringup import RAY_SYSTEM_CONFIG  # also sets Ray's environment

    if ray.is_initialized():
        yield 0
        return
    quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    ray.init(object_store_memory=OBJECT_STORE_BYTES, _system_config=RAY_SYSTEM_CONFIG, **quiet)
    try:
        yield int(TOUCH_SHARE * OBJECT_STORE_BYTES)
    finally:
        ray.shutdown()


def measure_dram(turn: TurnKV, repeats: int) -> Samples:
    with local_ray() as free_bytes, ThreadPoolExecutor(NUM_EXPORTS) as pool:
        import ray

        actor = ray.remote(Exporter).options(num_cpus=0, max_concurrency=NUM_EXPORTS).remote(turn)
        _touch_store(actor, free_bytes)
        stored = [ray.put(in_parts(chunk)) for chunk in turn.chunks]
        everyone = range(len(turn.chunks))
        small = np.ones(SMALL_OBJECT_BYTES, np.uint8)

        def save() -> None:
            actor.begin.remote()
            ray.wait([actor.saved.remote(i) for i in everyone], num_returns=len(everyone), fetch_local=False)

        def export() -> None:
            ray.wait([actor.export.remote(i) for i in everyone], num_returns=len(everyone), fetch_local=False)

        def load(i: int) -> None:
            turn.load(i, read_chunk(whole(ray.get(stored[i]))))

        def load_together() -> None:
            """As a restore does: one question for all chunks."""
            for i, found in enumerate(ray.get(stored)):
                turn.load(i, read_chunk(whole(found)))

        cases: dict[str, Case] = {
            "memcpy": partial(each, turn.copy, everyone),
            "memcpy_2": lambda: drain(pool.map(turn.copy, everyone)),
            "encode": partial(each, turn.encode, everyone),
            "put": partial(each, lambda i: ray.put(in_parts(turn.chunks[i])), everyone),
            "put_small": partial(each, lambda _: ray.put(small), everyone),
            "checksum": partial(each, lambda i: checksum(turn.chunks[i]), everyone),
            "export": export,
            "save": save,
            "load": load_together,
            "load_2": lambda: drain(pool.map(load, everyone)),
        }
        samples = side_by_side(cases, repeats, warm_ups=2)
        ray.kill(actor)
        return samples


def _touch_store(actor: Any, num_bytes: int) -> None:
    """Driver and actor write to nearly all of the object store once, so that no case pays for its pages."""
    import ray

    for fill in (lambda: ray.put(np.ones(num_bytes, np.uint8)), lambda: actor.fill.remote(num_bytes)):
        ref = fill()
        ray.wait([ref], fetch_local=False)
        del ref
        time.sleep(FREE_S)
