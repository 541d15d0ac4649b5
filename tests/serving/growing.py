"""A cluster whose nodes come when they are asked for: replicas wait for room at bring-up, and again under load.

A program of its own (test_growing.py runs it), because a process has one Ray. Ray's own autoscaler would need machines
to start; here the main thread looks at the same demand, placement groups that wait, and adds a node for each.
"""

import asyncio
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ["RAY_AUTH_MODE"] = "disabled"

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from actors.engine.params import SamplingParams
from actors.wire import TurnRequest
from cluster.bringup import RAY_SYSTEM_CONFIG
from cluster.config import config_from
from cluster.serving import keeper as keeper_module
from cluster.serving import scaling
from cluster.serving.keeper import Keeper

MIB = 1 << 20
LIMIT_S = 120.0


def main(model: str) -> None:
    nodes = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 128 * MIB, "_system_config": RAY_SYSTEM_CONFIG},
    )
    try:
        ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(serve, model)
            asked: dict[str, dict[str, float]] = {}
            while not work.done():
                for name, (bundle,) in waiting().items():
                    if name not in asked:
                        asked[name] = bundle
                        nodes.add_node(num_cpus=1, object_store_memory=128 * MIB)
                time.sleep(0.2)
        print(json.dumps({"asked": list(asked.values()), "replicas": work.result(), "waiting": len(waiting())}))
    finally:
        ray.shutdown()
        nodes.shutdown()


def serve(model: str) -> list[int]:
    config = config_from(
        {
            "model": {"path": model, "kv_tokens": 4096, "max_running_turns": 2, "num_threads": 1},
            "store": {"dram_bytes": 32 * MIB},
            "cluster": {"num_replicas": 1, "node_wait_s": 60, "heartbeat_s": 0.5},
            "serving": {"max_replicas": 2, "drain_s": 20.0},
        }
    )
    scaling.UP_AFTER_S, scaling.DOWN_AFTER_S, keeper_module.LOOK_S = 0.5, 1.0, 0.3
    keeper = Keeper(config)
    try:
        return asyncio.run(under_load(keeper))
    finally:
        keeper.close()


def waiting() -> dict[str, list[dict[str, float]]]:
    return {
        name: list(group["bundles"].values())
        for name, group in placement_group_table().items()
        if group["state"] == "PENDING"
    }


async def under_load(keeper: Keeper) -> list[int]:
    """How many replicas there were at the beginning, under load, and when it was over."""
    sampling = SamplingParams(max_new_tokens=300, ignore_eos=True)
    counts = [len((await keeper.state()).replicas)]
    requests = [
        TurnRequest(turn_id=f"t{i}", session_id=f"s{i}", token_ids=tuple(range(5 + i, 40 + i)), sampling=sampling)
        for i in range(40)
    ]
    turns = [asyncio.ensure_future(keeper._cluster.client.run(request)) for request in requests]
    for count in (2, 1):
        deadline = time.monotonic() + LIMIT_S
        while len((await keeper.state()).replicas) != count and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        counts.append(len((await keeper.state()).replicas))
    answers = await asyncio.gather(*turns)
    assert all(len(answer.tokens) == 300 for answer in answers)
    await keeper.drain()
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:])
