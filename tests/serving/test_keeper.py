"""The keeper on a real cluster: replicas follow the load, a hung engine is started anew, a drained cluster is quiet."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.engine.params import SamplingParams
from actors.wire import TurnRequest
from cluster.bringup import running
from cluster.client import Client, TurnFailed
from cluster.config import config_from
from cluster.serving import keeper as keeper_module
from cluster.serving import scaling
from cluster.serving.keeper import Keeper, history_path
from tests.serving.server import serving_config

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

LIMIT_S = 90.0


@pytest.fixture(scope="module")
def keeper(local_ray: None, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    """One that looks and decides quickly."""
    config = serving_config(
        small_model,
        tmp_path_factory.mktemp("kept"),
        model={"max_running_turns": 2},
        serving={"max_replicas": 2, "drain_s": 20.0, "hang_limit_s": 3.0},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "UP_AFTER_S", 0.5)
        patch.setattr(scaling, "DOWN_AFTER_S", 1.0)
        patch.setattr(keeper_module, "LOOK_S", 0.3)
        made = Keeper(config)
        yield made
        made.close()


async def until(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not await condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.2)


def request(i: int, num_tokens: int) -> TurnRequest:
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    return TurnRequest(turn_id=f"t{i}", session_id=f"s{i}", token_ids=tuple(range(5 + i, 40 + i)), sampling=sampling)


def test_replicas_come_and_go_with_the_load(keeper):
    async def scenario() -> None:
        async def has(count: int) -> bool:
            return len((await keeper.state()).replicas) == count

        state = await keeper.state()
        client = keeper._cluster.client
        assert len(state.replicas) == 1
        turns = [asyncio.ensure_future(client.run(request(i, 400))) for i in range(12)]
        await until(lambda: has(2))
        answers = await asyncio.gather(*turns)
        assert all(len(answer.tokens) == 400 for answer in answers)
        await until(lambda: has(1))
        after = await client.run(request(99, 3))
        assert len(after.tokens) == 3
        await keeper.drain()

    asyncio.run(scenario())


def test_a_hung_engine_is_started_anew_and_its_turn_goes_on(keeper):
    async def scenario() -> None:
        await keeper.state()
        client = keeper._cluster.client
        turn = asyncio.ensure_future(client.run(request(0, 1200)))
        (stats,) = await asyncio.to_thread(keeper._cluster.replica_stats)
        await asyncio.sleep(1.0)  # the keeper has heard from it
        os.kill(stats["pid"], signal.SIGSTOP)  # this engine's own process: it makes no step any more
        try:
            answer = await asyncio.wait_for(turn, LIMIT_S)
        finally:
            with suppress(ProcessLookupError):
                os.kill(stats["pid"], signal.SIGKILL)
        assert len(answer.tokens) == 1200
        assert answer.num_attempts > 1

    asyncio.run(scenario())


def test_turns_of_a_cluster_that_is_taken_down_go_on_in_the_next(keeper, small_model, tmp_path):
    async def scenario() -> None:
        with running(serving_config(small_model, tmp_path)) as old:
            client = Client(old.scheduler, old.model, may_move=True)
            begun = asyncio.Event()
            cut = asyncio.ensure_future(client.run(request(0, 800), on_delta=lambda _: begun.set()))
            await begun.wait()
            await old.scheduler.drain.remote()
            late = asyncio.ensure_future(client.run(request(1, 5)))
            with pytest.raises(TurnFailed, match="taken down"):
                await old.client.run(request(2, 5))
            assert not late.done()
            assert not cut.done()
        await asyncio.sleep(0.5)
        assert not late.done()
        assert not cut.done()
        client.move((await keeper.state()).scheduler, keeper._cluster.model)
        cut_answer, late_answer = await asyncio.wait_for(asyncio.gather(cut, late), LIMIT_S)
        assert cut_answer.num_attempts > 1
        assert len(late_answer.tokens) == 5
        whole = await client.run(request(0, 800))
        assert cut_answer.token_ids == whole.token_ids

    asyncio.run(scenario())


def test_two_clusters_with_equal_names_are_not_mixed_up(keeper, small_model, tmp_path):
    """A turn that waited in the old one is dispatched there after the move."""

    async def scenario() -> None:
        with running(serving_config(small_model, tmp_path, model={"max_running_turns": 1})) as old:
            client, begun = Client(old.scheduler, old.model, may_move=True), asyncio.Event()
            running_there = asyncio.ensure_future(client.run(request(0, 300), on_delta=lambda _: begun.set()))
            await begun.wait()
            waiting_there = asyncio.ensure_future(client.run(request(1, 5)))
            while not (await old.scheduler.snapshot.remote())["turns_waiting"]:
                await asyncio.sleep(0.02)
            client.move((await keeper.state()).scheduler, keeper._cluster.model)
            answers = await asyncio.wait_for(asyncio.gather(running_there, waiting_there), LIMIT_S)
            assert [answer.num_attempts for answer in answers] == [1, 1]
            here = await client.run(request(2, 5))
            assert here.num_attempts == 1
            assert (await asyncio.to_thread(keeper._cluster.scheduler_stats))["turns_running"] == 0

    asyncio.run(scenario())


def test_metrics_of_other_fronts_are_passed_on(keeper):
    async def scenario() -> None:
        await keeper.exchange("a", "text of a")
        _, others = await keeper.exchange("b", "text of b")
        assert others == {"a": "text of a"}

    asyncio.run(scenario())


def test_a_scheduler_that_is_dead_for_good_is_no_health(keeper):
    async def scenario() -> None:
        await keeper.check_health()
        ray.kill(keeper._cluster.scheduler, no_restart=True)
        with pytest.raises(RuntimeError, match="dead for good"):
            await keeper.check_health()

    asyncio.run(scenario())


def test_where_conversations_are_remembered(tmp_path):
    def path(**sections: Any) -> str | None:
        return history_path(config_from(sections))

    assert path() is None
    assert path(store={"ssd_url": "/mnt/nvme/reprise/"}) == "/mnt/nvme/reprise-conversations.sqlite3"
    assert path(store={"ssd_url": "file:///mnt/ssd"}) == "/mnt/ssd-conversations.sqlite3"
    assert path(store={"ssd_url": "/mnt/{node_ip}"}) is None
    assert path(store={"ssd_url": "/mnt/x"}, serving={"history_path": "/var/h"}) == "/var/h"
    assert ray.is_initialized()
