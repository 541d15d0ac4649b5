"""Administration on a real local cluster: what is deleted is nowhere, and a client that died takes no slot with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from actors.engine.params import SamplingParams
from actors.engine.turns import FinishReason
from actors.scheduler import UNHEARD_S
from actors.wire import TurnRequest
from cluster import bringup
from cluster.prefixes import Prefixes
from policies import messages as m
from policies.messages import Tier
from storage import keys
from tests.cluster.jobs import config_for

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

PROMPT = tuple(range(10, 110))
NUM_SHARED = 32  # a system prompt of one chunk


@pytest.fixture(scope="module")
def cluster(local_ray: None, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bringup.Running]:
    """One turn at a time."""
    config = config_for(small_model, ssd_url=str(tmp_path_factory.mktemp("ssd")), ssd_bytes=64 << 20)
    with bringup.running(replace(config, model=replace(config.model, max_running_turns=1))) as running:
        yield running


def request(turn_id: str, session_id: str, prompt: tuple[int, ...], num_new: int = 4) -> TurnRequest:
    sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
    return TurnRequest(turn_id=turn_id, session_id=session_id, token_ids=prompt, sampling=sampling)


def marks_of(cluster: bringup.Running, tokens: tuple[int, ...]) -> tuple[m.Mark, ...]:
    chain = keys.chain(cluster.client.model.root, tokens, cluster.client.model.chunk_tokens, cuts=(len(PROMPT),))
    return tuple(m.Mark(end, key) for end, key in chain)


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.1)


def is_at_rest(cluster: bringup.Running) -> bool:
    figures = cluster.scheduler_stats()
    return not figures["incoming"] and not figures["chunks_deleting"]


def test_a_deleted_session_is_nowhere_any_more(cluster: bringup.Running) -> None:
    scheduler, [replica] = cluster.scheduler, cluster.replicas.values()
    answer = asyncio.run(cluster.client.run(request("a/1", "a", PROMPT)))
    marks = marks_of(cluster, (*PROMPT, *answer.token_ids[:-1]))
    names = tuple(mark.key for mark in marks)
    wait_until(lambda: is_at_rest(cluster))
    stored = ray.get(scheduler.where.remote(names))
    assert [view.start for view in stored] == [0, 32, 64, 96]
    assert all({copy.tier for copy in view.copies} == {Tier.DRAM, Tier.SSD} for view in stored)
    full = tuple(mark.key for mark in marks if mark.end % 32 == 0)
    assert ray.get(replica.kept.remote(names)) == [*full, names[-1]], "full chunks and the tail"

    ray.get(scheduler.pin.remote("a", marks, 3600.0))
    beyond = tuple(mark for mark in marks if mark.end > NUM_SHARED)
    ray.get(scheduler.delete.remote("a", beyond, 60.0))
    wait_until(lambda: is_at_rest(cluster) and len(ray.get(scheduler.where.remote(names))) == 1)
    wait_until(lambda: ray.get(replica.kept.remote(names)) == [full[0]])
    ray.get(scheduler.check.remote())
    again = asyncio.run(cluster.client.run(request("b/1", "b", PROMPT)))
    assert sum(again.account.reused.values()) == NUM_SHARED
    assert again.token_ids == answer.token_ids


def test_a_deleted_tenant_is_nowhere_any_more_and_the_others_are_where_they_were(cluster: bringup.Running) -> None:
    """In HBM, too; what is computed of it anew later is kept again."""
    scheduler, [replica], model = cluster.scheduler, cluster.replicas.values(), cluster.client.model
    prefixes = Prefixes(scheduler, model)
    tenant = prefixes.of(salt="alice")
    prompt = tuple(range(50, 150))
    mine = replace(request("alice/1", "alice", prompt), root=tenant.key)
    answer = asyncio.run(cluster.client.run(mine))
    asyncio.run(cluster.client.run(request("other/1", "other", prompt)))
    names = [key for _, key in keys.chain(tenant.key, prompt, model.chunk_tokens)][:3]
    others = [key for _, key in keys.chain(model.root, prompt, model.chunk_tokens)][:3]
    assert prefixes.of(prompt[:32], salt="alice").key == names[0]
    wait_until(lambda: is_at_rest(cluster) and len(ray.get(scheduler.where.remote(names))) == 3)
    assert ray.get(replica.kept.remote(names)) == names

    async def steer() -> None:
        await prefixes.live(tenant, 3600.0)
        await prefixes.pin(tenant, 3600.0)
        await prefixes.expire(prefixes.of(prompt[:32]))
        await prefixes.delete(tenant, refuse_s=0.5)

    asyncio.run(steer())
    wait_until(lambda: is_at_rest(cluster) and not ray.get(scheduler.where.remote(names)))
    wait_until(lambda: ray.get(replica.kept.remote(names)) == [])
    assert len(ray.get(scheduler.where.remote(others))) == 3
    ray.get(scheduler.check.remote())
    time.sleep(0.5)
    again = asyncio.run(cluster.client.run(replace(mine, turn_id="alice/2")))
    assert sum(again.account.reused.values()) == 0
    assert again.token_ids == answer.token_ids
    wait_until(lambda: len(ray.get(scheduler.where.remote(names))) == 3)


def test_times_that_are_none_are_refused(cluster: bringup.Running) -> None:
    prefixes = Prefixes(cluster.scheduler, cluster.client.model)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="give seconds"):
            asyncio.run(prefixes.live(prefixes.of(), seconds))
    with pytest.raises(ValueError, match="give seconds"):
        asyncio.run(prefixes.pin(prefixes.of(), -1.0))


def test_a_client_that_died_before_it_reached_its_replica_takes_no_slot(cluster: bringup.Running) -> None:
    prompt = tuple(range(200, 240))
    marks = tuple(m.Mark(end, f"k{end}") for end in (32, 40))
    turn = m.Turn(turn_id="dead/1", session_id="dead", prompt=marks, num_prompt_tokens=40, max_new_tokens=4)
    dispatch = ray.get(cluster.scheduler.submit.remote(turn)).dispatch
    [replica] = cluster.replicas.values()
    assert not ray.get(replica.holds.remote("dead/1", dispatch.attempt))
    began = time.monotonic()
    answer = asyncio.run(cluster.client.run(request("alive/1", "alive", prompt)))
    assert answer.finish_reason == FinishReason.LENGTH
    assert UNHEARD_S - 1.0 < time.monotonic() - began < UNHEARD_S + 10.0
    assert cluster.scheduler_stats()["turns_running"] == 0
