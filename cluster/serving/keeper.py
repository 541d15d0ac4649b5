"""The keeper: owns the cluster that the front processes serve from, and keeps it as it should be.

    bring-up -> [ replicas to the load | stores to new nodes | hung replicas anew ] -> drain -> end

There is one. Its process's end is the end of the cluster's actors; what lies on SSD and in object storage stays, and
is found again by the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack, suppress
from contextvars import Context
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.history import HistoryActor
from cluster.bringup import BringUpError, Running, running
from cluster.config import Config, ConfigError
from cluster.serving.connection import ClusterState
from cluster.serving.scaling import Load, Scaler

log = logging.getLogger(__name__)

LOOK_S = 2.0
STATS_LIMIT_S = 5.0
QUIET_S = 0.5  # nothing runs for so long: the cluster is drained
OPEN_S = 2.0  # a cluster that is to be drained still takes turns: those of front processes that end with it
HISTORY_START_S = 60.0


class Keeper:
    """Plain class; becomes a Serve deployment of one replica in deployment.py. Raises what bring-up raises."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stack = ExitStack()
        self._cluster: Running = self._stack.enter_context(running(config))
        self._history = start_history(config)
        self._stack.callback(ray.kill, self._history)
        self._scaler = Scaler(config.cluster.num_replicas, config.serving.max_replicas)
        self._expositions: dict[str, tuple[float, str]] = {}
        self._closing: set[str] = set()  # replicas that take no more turns
        self._heard: dict[str, float] = {}  # replica -> when it last said that it works
        self._watch: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Serve asks now and then, and starts another keeper when this raises: a cluster without scheduler is lost."""
        try:
            await self._cluster.scheduler.heartbeat.remote("keeper")
        except ActorDiedError as error:  # not: it restarts
            raise RuntimeError(f"the scheduler is dead for good: {error}") from error
        except RayError as error:
            log.warning("the scheduler does not answer just now: %s", error)

    async def state(self) -> ClusterState:
        """Who is there now."""
        if self._watch is None or self._watch.done():
            self._watch = asyncio.get_running_loop().create_task(self._keep(), context=Context())  # not of this request
        return cluster_state(self._cluster, self._history)

    async def exchange(self, front_id: str, exposition: str) -> tuple[ClusterState, dict[str, str]]:
        """A front process's metrics for the others', and who is there now."""
        now = time.monotonic()
        self._expositions[front_id] = (now, exposition)
        self._expositions = {name: entry for name, entry in self._expositions.items() if now - entry[0] < 10 * LOOK_S}
        others = {name: text for name, (_, text) in self._expositions.items() if name != front_id}
        return await self.state(), others

    async def drain(self) -> None:
        """Returns when nothing runs or is on its way between tiers any more, or the time for that is over."""
        if self._watch is not None:
            self._watch.cancel()
        deadline = time.monotonic() + self._config.serving.drain_s
        if await self._until_quiet(min(deadline, time.monotonic() + OPEN_S)):
            return
        # Other turns wait, in their front processes, for the next keeper's cluster.
        await asyncio.to_thread(self._refuse)
        if not await self._until_quiet(deadline):
            log.warning("turns were still running after %g s", self._config.serving.drain_s)

    async def _until_quiet(self, deadline: float) -> bool:
        quiet_since: float | None = None
        while time.monotonic() < deadline:
            busy = await self._is_busy()
            quiet_since = None if busy else quiet_since or time.monotonic()
            if quiet_since is not None and time.monotonic() - quiet_since >= QUIET_S:
                return True
            await asyncio.sleep(0.1)
        return False

    def _refuse(self) -> None:
        with suppress(GetTimeoutError, RayError):
            ray.get(self._cluster.scheduler.drain.remote(), timeout=STATS_LIMIT_S)

    async def _is_busy(self) -> bool:
        stats = await asyncio.to_thread(self._cluster.scheduler_stats)
        busy = ("turns_running", "turns_waiting", "offers_pending", "incoming")
        return any(stats.get(name) for name in busy)

    def close(self) -> None:
        """Ends the cluster's actors."""
        self._stack.close()

    # --- keeping ------------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for duty in (self._restart_hung, self._add_stores, self._scale):
                try:
                    await duty()
                except (RayError, BringUpError, ConfigError) as error:
                    log.warning("the cluster could not be looked after just now: %s", error)
                except Exception:
                    log.exception("the cluster could not be looked after just now")

    async def _add_stores(self) -> None:
        await asyncio.to_thread(self._cluster.add_stores)

    async def _scale(self) -> None:
        stats = await asyncio.to_thread(self._cluster.scheduler_stats)
        if not stats:
            return
        fleet = {replica["replica_id"]: replica for replica in stats["fleet"]}
        absent = self._cluster.replicas.keys() - fleet.keys()  # being started, for the first time or anew
        if absent:
            await asyncio.to_thread(self._cluster.wish.set, 0)  # what is granted to it may be the room they wait for
        for replica_id in [name for name in self._closing if not fleet.get(name, {}).get("running")]:
            self._closing.remove(replica_id)
            await asyncio.to_thread(self._cluster.remove_replica, replica_id)
            log.warning("replica %s was not needed any more and has ended", replica_id)
        for replica_id in self._closing:
            if not fleet[replica_id]["closing"]:  # a scheduler that was started anew does not know
                self._cluster.scheduler.close_replica.remote(replica_id)
        load = self._load(stats, list(fleet.values()), len(absent - self._closing))
        target = self._scaler.target(load, time.monotonic())
        if target > load.num_replicas:
            added = await asyncio.to_thread(self._cluster.add_replicas, target - load.num_replicas)
            missing = target - load.num_replicas - len(added)
            log.warning("load: %d replicas are being added, %d have no room yet", len(added), missing)
            if not added and not absent:
                await asyncio.to_thread(self._cluster.wish.set, missing)
        elif target < load.num_replicas and not absent:
            self._close_one(list(fleet.values()))
        if self._scaler.wanted(load) <= load.num_replicas:
            await asyncio.to_thread(self._cluster.wish.set, 0)

    def _load(self, stats: dict[str, Any], fleet: list[dict[str, Any]], num_starting: int) -> Load:
        """Replicas that are being started count: they are on their way."""
        open_ones = [replica for replica in fleet if replica["replica_id"] not in self._closing]
        capacity = sum(replica["capacity_tokens"] for replica in open_ones)
        return Load(
            num_replicas=len(open_ones) + num_starting,
            num_running=stats["turns_running"],
            num_waiting=stats["turns_waiting"],
            slots_per_replica=self._config.model.max_running_turns,
            kv_share=sum(replica["tokens"] for replica in open_ones) / max(1, capacity),
        )

    def _close_one(self, fleet: list[dict[str, Any]]) -> None:
        """The replica with the least to do takes no more turns, and ends when it has none."""
        open_ones = [replica for replica in fleet if replica["replica_id"] not in self._closing]
        if len(open_ones) <= self._config.cluster.num_replicas:
            return
        least = min(open_ones, key=lambda replica: (replica["running"], replica["tokens"]))["replica_id"]
        self._closing.add(least)
        self._cluster.scheduler.close_replica.remote(least)

    async def _restart_hung(self) -> None:
        """An engine that has work and makes no step is not waited for any longer: its process is started anew."""
        now, limit_s = time.monotonic(), self._config.serving.hang_limit_s
        replicas = dict(self._cluster.replicas)
        answers = await asyncio.gather(*(asyncio.to_thread(_stats, replica) for replica in replicas.values()))
        for (replica_id, replica), stats in zip(replicas.items(), answers):
            hangs = stats is not None and stats["stalled_s"] > limit_s
            if stats is not None and not hangs:
                self._heard[replica_id] = now
            elif hangs or now - self._heard.get(replica_id, now) > limit_s:  # a new one may be loading its model
                log.error("replica %s hangs; it is started anew", replica_id)
                self._heard.pop(replica_id, None)
                ray.kill(replica, no_restart=False)
        self._heard = {name: when for name, when in self._heard.items() if name in replicas}


def _stats(replica: Any) -> dict[str, Any] | None:
    try:
        return dict(ray.get(replica.stats.remote(), timeout=STATS_LIMIT_S))
    except (GetTimeoutError, RayError):
        return None


def cluster_state(cluster: Running, history: Any) -> ClusterState:
    """What a front process must know of a running cluster."""
    section = cluster.config.serving
    return ClusterState(
        bring_up=cluster.names.bring_up,
        model=cluster.model,
        model_name=section.model_name or Path(cluster.config.model.path).name,
        scheduler=cluster.scheduler,
        history=history,
        stores=dict(cluster.stores),
        replicas=dict(cluster.replicas),
        slots_per_replica=cluster.config.model.max_running_turns,
    )


def start_history(config: Config) -> Any:
    """The actor that remembers conversations, on this process's node. OSError where it cannot write."""
    path = history_path(config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    actor = ray.remote(HistoryActor).options(**options).remote(path, config.serving.history_bytes)
    ray.get(actor.ready.remote(), timeout=HISTORY_START_S)
    return actor


def history_path(config: Config) -> str | None:
    """The configured file; else one beside a local SSD tier; None: in memory."""
    if config.serving.history_path is not None:
        return config.serving.history_path
    url = config.store.ssd_url
    if url is None or "{" in url:
        return None
    parsed = urlparse(url)
    if parsed.scheme not in ("", "file"):
        return None
    return f"{parsed.path.rstrip('/')}-conversations.sqlite3"
