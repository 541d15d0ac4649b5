"""Two hundred chats at a time on two cores, clients that go away among them: everything is answered or refused, and
nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from tests.serving.server import Served, served_from, serving_config
from tests.serving.test_door import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SOAK_S = float(os.environ.get("REPRISE_SOAK_S", "600"))
NUM_CHATS = 200
MAX_GROWTH = 1.3
WORDS = [
    "river",
    "stone",
    "lantern",
    "harbour",
    "window",
    "letter",
    "garden",
    "bridge",
    "copper",
    "winter",
    "music",
    "thread",
]


@pytest.fixture(scope="module")
def busy(local_ray: None, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = serving_config(
        small_model,
        tmp_path_factory.mktemp("busy"),
        model={"max_running_turns": 16, "kv_tokens": 16384},
        serving={"max_waiting_turns": 150, "history_bytes": "4MiB"},
    )
    with served_from(config) as server:
        yield server


class Crowd:
    """Chats without end until the time is over."""

    def __init__(self, server: Served, deadline: float) -> None:
        self.outcomes: Counter[str] = Counter()
        self.strange: list[str] = []
        self._server, self._deadline = server, deadline

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=NUM_CHATS + 10)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(self._chat(http, random.Random(i)) for i in range(NUM_CHATS)))

    async def _chat(self, http: httpx.AsyncClient, chance: random.Random) -> None:
        messages: list[dict[str, str]] = []
        while time.monotonic() < self._deadline:
            if len(messages) > 8:
                messages = []
            words = " ".join(chance.choice(WORDS) for _ in range(chance.randint(3, 40)))
            asked = [*messages, {"role": "user", "content": words}]
            text = await self._turn(http, asked, chance)
            if text is not None:
                messages = [*asked, {"role": "assistant", "content": text}]

    async def _turn(self, http: httpx.AsyncClient, asked: list[dict[str, str]], chance: random.Random) -> str | None:
        body: dict[str, Any] = {"messages": asked, "max_tokens": chance.randint(1, 24), "stream": chance.random() < 0.5}
        leaves_after_s = chance.choice((0.0, 0.05, 0.5, 2.0)) if chance.random() < 0.1 else None
        try:
            async with asyncio.timeout(leaves_after_s):
                reply = await http.post("/v1/chat/completions", json=body)
        except TimeoutError:
            self.outcomes["left"] += 1
            return None
        self.outcomes[str(reply.status_code)] += 1
        if reply.status_code == 429:
            await asyncio.sleep(chance.uniform(0.1, 1.0))
            return None
        if reply.status_code != 200:
            self.strange.append(reply.text)
            return None
        if body["stream"]:
            if not reply.text.endswith("data: [DONE]\n\n") or '"error"' in reply.text:
                self.strange.append(reply.text[-300:])
            return None
        return str(reply.json()["choices"][0]["message"]["content"])


def memory_of(server: Served) -> int:
    """Bytes resident in this process, the engine's, and those of all actors, without shared memory."""
    cluster = server.cluster
    actors = [cluster.scheduler, server.service.connection.state.history]
    actors += [*cluster.stores.values(), *cluster.replicas.values()]
    pids = [os.getpid(), *(stats["pid"] for stats in cluster.replica_stats())]
    pids += ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])
    sizes = [Path(f"/proc/{pid}/statm").read_text().split() for pid in pids]
    return sum(int(resident) - int(shared) for _, resident, shared, *_ in sizes) * os.sysconf("SC_PAGE_SIZE")


def test_a_crowd_leaves_nothing_behind(busy):
    began = time.monotonic()
    first = Crowd(busy, began + SOAK_S / 4)
    asyncio.run(first.run())
    early = memory_of(busy)
    second = Crowd(busy, began + SOAK_S)
    asyncio.run(second.run())
    outcomes = first.outcomes + second.outcomes
    print(f"\n{dict(outcomes)}, {early >> 20} -> {memory_of(busy) >> 20} MiB")
    assert first.strange + second.strange == []
    assert set(outcomes) <= {"200", "429", "left"}
    assert outcomes["200"] > outcomes["429"] / 10

    def in_use() -> dict[str, int]:
        stats = busy.cluster.scheduler_stats()
        left = {name: int(stats[name]) for name in ("turns_running", "turns_waiting", "leases", "offers_pending")}
        return {name: n for name, n in {**left, "requests": busy.service.num_running}.items() if n}

    try:
        wait_until(lambda: not in_use())  # who left last may still be taken leave of
    except AssertionError:
        raise AssertionError(f"still in use: {in_use()}") from None

    def held() -> dict[str, float]:
        (replica,) = busy.cluster.replica_stats()
        turns = {name: replica[name] for name in ("turns_running", "turns_queued", "turns_restoring")}
        blocks = replica["blocks"] - replica["blocks_free"] - replica["blocks_kept"]
        helpers = {name: replica[name] for name in ("blocks_pending", "loads_running", "saves_running")}
        return {name: n for name, n in {**turns, **helpers, "blocks": blocks}.items() if n}

    try:
        wait_until(lambda: not held())
    except AssertionError:
        raise AssertionError(f"the engine still holds {held()}") from None
    assert memory_of(busy) < MAX_GROWTH * early
