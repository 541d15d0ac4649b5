"""Two Ray nodes on this machine, a replica on each, and a placement that sends sessions to and fro: chunks follow.

A program of its own (test_two_nodes.py runs it), because a process has one Ray. Prints the report as JSON.
"""

import json
import os
import sys
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import ray
from ray.cluster_utils import Cluster

from actors.engine.params import SamplingParams
from cluster.batch import BatchOptions, Listener, run_batch
from cluster.bringup import RAY_SYSTEM_CONFIG
from cluster.config import config_from

MIB = 1 << 20


def main(model: str, chats: str, out: str) -> None:
    nodes = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": 128 * MIB,
            "include_dashboard": False,
            "_system_config": RAY_SYSTEM_CONFIG,
        },
    )
    try:
        nodes.add_node(num_cpus=1, object_store_memory=128 * MIB)
        nodes.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = nodes.address
        config = config_from(
            {
                "model": {"path": model, "chunk_tokens": 32, "block_tokens": 8, "kv_tokens": 4096, "num_threads": 1},
                "store": {"dram_bytes": 64 * MIB},
                "scheduler": {"placement": "tests.cluster.two_nodes:ToAndFro"},
                "cluster": {"num_replicas": 2, "heartbeat_s": 0.5, "start_limit_s": 90},
            }
        )
        sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
        options = BatchOptions(input=chats, out=out, concurrency=2, sampling=sampling, compare=True)
        report = run_batch(config, options, Listener())
        replicas = {json.loads(line)["replica"] for line in (Path(out) / "turns.jsonl").read_text().splitlines()}
        print(json.dumps({**report, "replicas": sorted(replicas)}))
    finally:
        ray.shutdown()
        nodes.shutdown()


class ToAndFro:
    """Never twice the same replica in a row for a session: what it needs lies on the other node."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def choose(self, turn, options):
        fresh = [option for option in options if option.replica_id != self._last.get(turn.session_id)]
        chosen = (fresh or options)[0].replica_id
        self._last[turn.session_id] = chosen
        return chosen


if __name__ == "__main__":
    main(*sys.argv[1:])
