"""Bringing a cluster up and down: Ray itself where none is running, the scheduler, a node store a node, the replicas.

Actors are plain classes; here, and for shards in actors/replica.py, they become Ray actors. They belong to this
process: when it ends, in whichever way, Ray ends them.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# A local Ray needs no token, and token mode switched on by accident locks `ray job submit` out.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine.tokenizer import ModelError
from actors.engine.turns import EngineConfig
from actors.node_store import NodeStore, StorePlan
from actors.replica import Replica, ReplicaPlan
from actors.scheduler import SchedulerActor
from actors.shard import ModelInfo, ShardPlan
from cluster import openmp
from cluster.client import Client
from cluster.config import Config, ConfigError
from cluster.nodes import Wish, alive_nodes, spread
from cluster.recording import check_recording, end_recording, record_plan
from policies.scheduler import Scheduler

log = logging.getLogger(__name__)

SILENCE_BEATS = 10
SAFE_SHARE = 0.7  # of Ray's object store: beyond it, mixed chunk sizes fragment and Ray falls back to disk
DEFAULT_SHARE = 0.6
MIN_LOCAL_STORE_BYTES = 256 * 1024**2
DEFAULT_LOCAL_STORE_BYTES = 4 * 1024**3
MAX_WAITING = 100_000
NODE_LOOK_S = 1.0
STATS_LIMIT_S = 30  # for all actors together; one takes some seconds to restart

# Ray moves nothing to disk on its own here, gives freed space back at once, and lets actors run as equals of its own
# processes: with a model on the CPU, each step would wait for the dashboard's agent and the log monitor.
RAY_SYSTEM_CONFIG = {
    "automatic_object_spilling_enabled": False,
    "free_objects_period_milliseconds": 0,
    "worker_niceness": 0,
}


class BringUpError(RuntimeError):
    """The cluster cannot serve as configured; the message says why and what to do."""


@dataclass(frozen=True)
class Names:
    """Names under which the actors of one bring-up find each other."""

    bring_up: str

    @property
    def scheduler(self) -> str:
        return f"reprise-{self.bring_up}-scheduler"

    def store(self, node_id: str) -> str:
        return f"reprise-{self.bring_up}-store-{node_id}"


@dataclass
class Running:
    """A cluster that takes turns. Replicas and node stores may come and go while it runs."""

    config: Config
    names: Names
    scheduler: Any
    stores: dict[str, Any] = field(default_factory=dict)
    replicas: dict[str, Any] = field(default_factory=dict)
    model: ModelInfo = field(init=False)
    _places: dict[str, str] = field(default_factory=dict)  # replica -> node
    _num_created: int = 0

    def __post_init__(self) -> None:
        self.wish = Wish(self.config.cluster.cpus_per_replica, self.config.cluster.gpus_per_replica)

    @cached_property
    def client(self) -> Client:
        """One for all turns of this process, one event loop at a time."""
        return Client(self.scheduler, self.model)

    def add_stores(self) -> list[str]:
        """Stores for the nodes that have none; their ids."""
        found = [node for node in alive_nodes() if node["NodeID"] not in self.stores]
        for node in found:
            self.stores[node["NodeID"]] = _create_store(self.config, node, self.names)
        return [node["NodeID"] for node in found]

    def add_replicas(self, count: int) -> dict[str, Any]:
        """So many more, or as many as fit, round the nodes that have a store and the resources. Not ready yet."""
        added = {}
        for node in self._room(count):
            replica_id = f"replica-{self._num_created}"
            self._num_created += 1
            self._places[replica_id] = node["NodeID"]
            added[replica_id] = node
        sharing = Counter(self._places.values())
        for replica_id, node in added.items():
            self.replicas[replica_id] = _create_replica(
                self.config, node, self.names, replica_id, sharing[node["NodeID"]]
            )
        return {replica_id: self.replicas[replica_id] for replica_id in added}

    def has_room(self, count: int) -> bool:
        """Whether so many more would fit."""
        return len(self._room(count)) == count

    def _room(self, count: int) -> list[dict[str, Any]]:
        section = self.config.cluster
        nodes = [node for node in alive_nodes() if node["NodeID"] in self.stores]
        return spread(nodes, list(self._places.values()), count, section.cpus_per_replica, section.gpus_per_replica)

    def remove_replica(self, replica_id: str) -> None:
        """At once; whatever runs there runs elsewhere again."""
        self._places.pop(replica_id, None)
        replica = self.replicas.pop(replica_id, None)
        if replica is not None:
            ray.kill(replica, no_restart=True)
            self.scheduler.replica_lost.remote(replica_id)

    def store_stats(self) -> list[dict[str, Any]]:
        return _stats_of(self.stores)

    def scheduler_stats(self) -> dict[str, Any]:
        """Empty while it restarts."""
        try:
            return dict(ray.get(self.scheduler.snapshot.remote(), timeout=30))
        except RayError:
            return {}

    def replica_stats(self) -> list[dict[str, Any]]:
        return _stats_of(self.replicas)


def _stats_of(actors: dict[str, Any]) -> list[dict[str, Any]]:
    """What each says of itself: one that restarts is waited for, one that is gone or does not answer is left out.

    What goes wrong in making the figures is raised.
    """
    asked = {name: actor.stats.options(max_task_retries=-1).remote() for name, actor in actors.items()}
    deadline = time.monotonic() + STATS_LIMIT_S
    found = []
    for name, answer in asked.items():
        try:
            found.append(ray.get(answer, timeout=max(0.0, deadline - time.monotonic())))
        except (RayActorError, GetTimeoutError) as error:
            log.warning("no figures from %s: %s", name, _first_line(error))
    return found


@contextmanager
def running(config: Config) -> Iterator[Running]:
    """Brings everything up, yields when the replicas are ready, tears down whatever happens.

    Raises BringUpError, ConfigError or ModelError in words for people.
    """
    check(config)
    started_ray = connect(config)
    cluster = _begin(config)
    try:
        _complete(cluster)
        yield cluster
    finally:
        if config.cluster.record:
            end_recording(cluster.scheduler)
        try:
            cluster.wish.set(0)
        finally:
            _tear_down([cluster.scheduler, *cluster.stores.values(), *cluster.replicas.values()], started_ray)


def check(config: Config) -> None:
    """What can be told before anything is started."""
    if not config.model.path:
        raise ConfigError("no model: give --model, or model.path in the configuration (a folder or a hub id)")
    if config.scheduler.strict_policies:
        raise ConfigError("scheduler.strict_policies is for `reprise lab`; a cluster goes on after a fault: set false")
    try:
        Scheduler(config.scheduler)
    except ValueError as error:
        raise ConfigError(f"scheduler: {error}") from None


def connect(config: Config) -> bool:
    """Joins a Ray cluster, or starts a local one; True if it is this process's to shut down. Raises BringUpError."""
    if ray.is_initialized():
        return False
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local",  # not one that happens to run on this machine: it has its own settings
                object_store_memory=_local_store_bytes(config),
                include_dashboard=False,
                _system_config=RAY_SYSTEM_CONFIG,
                **quiet,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        raise BringUpError(f"cannot start on {where}: {str(error).strip().splitlines()[0]}") from error
    return True


def _local_store_bytes(config: Config) -> int:
    wanted = int(config.store.dram_bytes / SAFE_SHARE) + 1 if config.store.dram_bytes else DEFAULT_LOCAL_STORE_BYTES
    wanted = max(wanted, MIN_LOCAL_STORE_BYTES)
    room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else wanted
    if wanted > room:
        if config.store.dram_bytes:
            raise ConfigError(
                f"store.dram_bytes needs a Ray object store of {wanted:,} bytes but /dev/shm has {room:,}; "
                f"set store.dram_bytes to at most {int(room * SAFE_SHARE):,} or enlarge /dev/shm"
            )
        wanted = int(room * 0.8)
    return wanted


def _begin(config: Config) -> Running:
    names = Names(uuid.uuid4().hex[:8])
    scheduler = (
        ray.remote(SchedulerActor)
        .options(name=names.scheduler, num_cpus=0, max_restarts=-1, max_concurrency=MAX_WAITING, max_task_retries=0)
        .remote(config.scheduler, SILENCE_BEATS * config.cluster.heartbeat_s, record=record_plan(config.cluster))
    )
    return Running(config, names, scheduler)


def _complete(cluster: Running) -> None:
    """Stores and replicas, ready for turns."""
    config = cluster.config
    _place_replicas(cluster)
    try:
        limit_s = config.cluster.start_limit_s
        check_recording(cluster.scheduler, limit_s)
        ray.get([store.ready.remote() for store in cluster.stores.values()], timeout=limit_s)
        ready = [replica.ready.remote() for replica in cluster.replicas.values()]
        infos: list[ModelInfo] = ray.get(ready, timeout=limit_s)
    except GetTimeoutError:
        raise BringUpError(
            f"the replicas were not ready after {config.cluster.start_limit_s:g} s: other jobs may hold the CPUs or "
            f"GPUs they need (see `ray status`); lower cluster.cpus_per_replica, or raise cluster.start_limit_s"
        ) from None
    except RayTaskError as error:
        raise _in_words(error) from None
    except RayError as error:
        raise BringUpError(f"an actor died while starting: {_first_line(error)}") from error
    if len({info.root for info in infos}) > 1:
        raise BringUpError("replicas loaded different models; the model's folder must be the same on every node")
    cluster.model = infos[0]


def _place_replicas(cluster: Running) -> None:
    """Stores, and replicas beside them, when there is room for all; nodes that an autoscaler may add are waited for as
    long as is configured. Until then nothing is placed that would compete with what holds the room."""
    section = cluster.config.cluster
    deadline = time.monotonic() + section.node_wait_s
    while True:
        cluster.add_stores()
        if cluster.has_room(section.num_replicas):
            cluster.wish.set(0)
            cluster.add_replicas(section.num_replicas)
            return
        if time.monotonic() >= deadline:
            raise BringUpError(
                f"{section.num_replicas} replicas do not fit: each needs {section.cpus_per_replica:g} CPUs and "
                f"{section.gpus_per_replica:g} GPUs; lower cluster.num_replicas or cluster.cpus_per_replica, add "
                "nodes, or wait for an autoscaler's (cluster.node_wait_s)"
            )
        cluster.wish.set(section.num_replicas)
        time.sleep(NODE_LOOK_S)


def _create_store(config: Config, node: dict[str, Any], names: Names) -> Any:
    section = config.store
    plan = StorePlan(
        dram_bytes=_dram_budget(config, node),
        ssd_url=_place(section.ssd_url, node),
        ssd_bytes=section.ssd_bytes,
        object_url=section.object_url,
        object_bytes=section.object_bytes,
    )
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return (
        ray.remote(NodeStore)
        .options(
            name=names.store(node["NodeID"]),
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=here,
        )
        .remote(node["NodeID"], plan, names.scheduler, config.cluster.heartbeat_s)
    )


def _dram_budget(config: Config, node: dict[str, Any]) -> int:
    capacity = int(node["Resources"].get("object_store_memory", 0))
    budget = config.store.dram_bytes or int(capacity * DEFAULT_SHARE)
    if budget > capacity * SAFE_SHARE:
        raise ConfigError(
            f"store.dram_bytes is {budget:,} but node {node['NodeManagerAddress']} has an object store of {capacity:,} "
            f"bytes and at most {SAFE_SHARE:.0%} of it can be used without Ray spilling; lower store.dram_bytes to "
            f"{int(capacity * SAFE_SHARE):,} or start Ray with --object-store-memory={int(budget / SAFE_SHARE) + 1}"
        )
    return budget


def _place(url: str | None, node: dict[str, Any]) -> str | None:
    return url.replace("{node_ip}", node["NodeManagerAddress"]) if url else None


def _create_replica(config: Config, node: dict[str, Any], names: Names, replica_id: str, sharing: int) -> Any:
    node_id = node["NodeID"]
    plan = _replica_plan(config, node, sharing)
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return (
        ray.remote(Replica)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy=here)
        .remote(replica_id, plan, names.scheduler, names.store(node_id), node_id)
    )


def _replica_plan(config: Config, node: dict[str, Any], sharing: int) -> ReplicaPlan:
    section = config.model
    num_threads = section.num_threads or max(1, int(node["Resources"].get("CPU", 1)) // sharing)
    engine = EngineConfig(
        model=section.path,
        dtype=section.dtype,
        device=section.device,
        block_tokens=section.block_tokens,
        kv_tokens=section.kv_tokens,
        chunk_tokens=section.chunk_tokens,
        max_step_tokens=section.max_step_tokens,
        max_running_turns=section.max_running_turns,
        write_buffer_chunks=section.write_buffer_chunks,
        keep_finished=section.keep_finished,
        read_ahead_chunks=section.read_ahead_chunks,
        staging_buffers=section.staging_buffers,
        load_deadline_s=section.load_deadline_s,
        num_threads=num_threads,
    )
    shard = ShardPlan(
        engine=engine,
        salt=config.store.salt,
        ssd_url=_place(config.store.ssd_url, node),
        object_url=config.store.object_url,
        eviction=config.scheduler.eviction,
    )
    return ReplicaPlan(
        shard=shard,
        num_cpus=config.cluster.cpus_per_replica,
        num_gpus=config.cluster.gpus_per_replica,
        env_vars={"OMP_NUM_THREADS": str(num_threads), **openmp.WAITING},
        heartbeat_s=config.cluster.heartbeat_s,
    )


def _tear_down(actors: list[Any], started_ray: bool) -> None:
    for actor in reversed(actors):
        ray.kill(actor, no_restart=True)
    if started_ray:
        ray.shutdown()


def _in_words(error: RayTaskError) -> Exception:
    cause = error.cause
    if isinstance(cause, (ModelError, ConfigError, ValueError)):
        return cause if isinstance(cause, (ModelError, ConfigError)) else BringUpError(str(cause))
    return BringUpError(_first_line(error))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
