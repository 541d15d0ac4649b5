"""What a cluster tells of itself while its actors come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from actors.engine.params import SamplingParams
from actors.engine.turns import FinishReason
from actors.wire import Piece, TurnEnd, TurnRequest
from cluster import bringup
from cluster.bringup import _stats_of as stats_of
from cluster.listening import Listener
from policies import messages as m
from tests.cluster.jobs import config_for


def test_figures_wait_for_who_restarts_and_leave_out_who_is_gone(local_ray: None, small_model: Path) -> None:
    with bringup.running(config_for(small_model)) as cluster:
        (store,) = cluster.stores.values()
        ray.kill(store, no_restart=False)
        assert [figures["saved_bytes"] for figures in cluster.store_stats()] == [0]
        ray.kill(store, no_restart=True)
        assert cluster.store_stats() == []
        assert len(cluster.replica_stats()) == 1


def test_a_replica_that_loads_its_model_again_holds_its_turns(local_ray: None, small_model: Path) -> None:
    """Ray calls it alive as soon as its process is there."""

    async def ask(replica: Any, num_tokens: int) -> list[Piece]:
        request = TurnRequest(
            turn_id=f"of {num_tokens}",
            session_id="s",
            token_ids=tuple(range(5, 5 + num_tokens)),
            sampling=SamplingParams(max_new_tokens=2, ignore_eos=True),
        )
        dispatch = m.Dispatch(turn_id=request.turn_id, replica_id="replica-0", plan=m.RestorePlan())
        pieces: list[Piece] = []
        while True:
            try:
                await Listener(replica).run(request, dispatch, pieces.append)
            except RayActorError:  # the process is not there yet
                await asyncio.sleep(0.05)
            else:
                return pieces

    with bringup.running(config_for(small_model)) as cluster:
        (replica,) = cluster.replicas.values()
        ray.kill(replica, no_restart=False)
        *_, end = asyncio.run(asyncio.wait_for(ask(replica, 3), 60))
        assert isinstance(end, TurnEnd)
        assert end.finish_reason is FinishReason.LENGTH
        *_, refused = asyncio.run(asyncio.wait_for(ask(replica, 100_000), 60))
        assert isinstance(refused, TurnEnd)
        assert (refused.finish_reason, refused.may_retry) == (FinishReason.FAILED, False)
        assert refused.error


def test_what_goes_wrong_in_figures_is_not_hidden(local_ray: None) -> None:
    @ray.remote(num_cpus=0)
    class Broken:
        def stats(self) -> None:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stats_of({"store": Broken.remote()})
