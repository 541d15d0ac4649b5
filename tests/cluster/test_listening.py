"""A client's turns on one replica share a stream: it may be slow, break, or die with its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.engine.params import SamplingParams
from actors.wire import TurnRequest
from cluster.bringup import Running, running
from cluster.client import Client
from tests.cluster.jobs import config_for

LONG = 1500
LIMIT_S = 20.0


@pytest.fixture(scope="module")
def cluster(local_ray: None, small_model: Path) -> Iterator[Running]:
    with running(config_for(small_model)) as up:
        yield up


def request(name: str, num_tokens: int) -> TurnRequest:
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    return TurnRequest(turn_id=name, session_id=name, token_ids=tuple(range(5, 40)), sampling=sampling)


def wait_until_free(cluster: Running) -> float:
    """How long it took."""
    began = time.monotonic()
    while cluster.scheduler_stats()["turns_running"]:
        assert time.monotonic() - began < LIMIT_S
        time.sleep(0.05)
    return time.monotonic() - began


@ray.remote(num_cpus=0)
class Other:
    """A client in a process of its own."""

    def __init__(self, scheduler: Any, model: Any) -> None:
        self._client = Client(scheduler, model)

    async def run(self, name: str, num_tokens: int, sleep_s: float = 0.0, asleep: str = "") -> tuple[int, ...]:
        """With a sleep, this process hears nothing for so long, in the middle of the answer; then the file is there."""
        count = 0

        def on_delta(_: Any) -> None:
            nonlocal count
            count += 1
            if count == 20 and asleep:
                Path(asleep).touch()
                time.sleep(sleep_s)

        return (await self._client.run(request(name, num_tokens), on_delta=on_delta)).token_ids


def test_turns_of_one_client_keep_apart(cluster):
    async def scenario() -> None:
        client = cluster.client
        together = await asyncio.gather(*(client.run(request(f"t{i}", 50 + i)) for i in range(6)))
        for i, answer in enumerate(together):
            assert answer.token_ids == (await client.run(request(f"t{i}", 50 + i))).token_ids

    asyncio.run(scenario())


def test_a_slow_client_loses_nothing_and_holds_up_nobody(cluster, tmp_path):
    slow, quick = [Other.remote(cluster.scheduler, cluster.model) for _ in range(2)]
    ray.get(quick.run.remote("first", 2), timeout=60)
    asleep = tmp_path / "asleep"
    sleeping = slow.run.remote("slow", 800, sleep_s=6.0, asleep=str(asleep))
    while not asleep.exists():
        time.sleep(0.02)
    began = time.monotonic()
    ray.get(quick.run.remote("quick", 300), timeout=60)  # long enough for the sleeper's messages to be too many
    assert time.monotonic() - began < 5.0
    assert ray.get(sleeping, timeout=60) == ray.get(quick.run.remote("slow", 800), timeout=60)


def test_the_turns_of_a_client_that_dies_end_with_it(cluster):
    other = Other.remote(cluster.scheduler, cluster.model)
    ray.get(other.run.remote("first", 2), timeout=60)
    other.run.remote("long", LONG)
    while not cluster.scheduler_stats()["turns_running"]:
        time.sleep(0.02)
    time.sleep(0.2)
    ray.kill(other)
    assert wait_until_free(cluster) < 2.0, "the whole answer would take longer"


@pytest.mark.slow
def test_a_client_that_dies_in_silence_is_noticed(local_ray, small_model):
    """By empty messages, one every twenty seconds."""
    config = config_for(small_model)

    async def num_listeners(replica: Any) -> int:
        return int((await replica.stats.remote())["listeners"])

    with running(config) as cluster:
        (replica,) = cluster.replicas.values()
        other = Other.remote(cluster.scheduler, cluster.model)
        ray.get(other.run.remote("first", 2), timeout=60)
        assert asyncio.run(num_listeners(replica)) == 1
        ray.kill(other)
        deadline = time.monotonic() + 60
        while asyncio.run(num_listeners(replica)):
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_a_stream_that_breaks_costs_an_attempt(cluster):
    async def scenario() -> None:
        client, begun = cluster.client, asyncio.Event()
        turn = asyncio.ensure_future(client.run(request("broken", 300), on_delta=lambda _: begun.set()))
        await begun.wait()
        (listener,) = client._cluster._listeners.values()
        listener._reader.cancel()
        answer = await asyncio.wait_for(turn, LIMIT_S)
        assert answer.num_attempts == 2
        assert answer.token_ids == (await client.run(request("broken", 300))).token_ids

    asyncio.run(scenario())
    wait_until_free(cluster)


def test_a_turn_that_is_left_ends(cluster):
    async def scenario() -> None:
        begun = asyncio.Event()
        turn = asyncio.ensure_future(cluster.client.run(request("left", LONG), on_delta=lambda _: begun.set()))
        await begun.wait()
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)
        await asyncio.to_thread(wait_until_free, cluster)

    asyncio.run(scenario())
