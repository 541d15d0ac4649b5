"""Small batches on a small model in fp32: how the tests of this folder set them up and read what came of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from actors.engine.params import SamplingParams
from cluster.batch import BatchOptions
from cluster.bringup import Running
from cluster.config import Config, config_from

KIB = 1024
ANSWER_TOKENS = 12
QUIET_S, REST_LIMIT_S = 0.5, 30.0


def config_for(model: Path, *, replicas: int = 1, keep_finished: bool = True, **store: Any) -> Config:
    return config_from(
        {
            "model": {
                "path": str(model),
                "chunk_tokens": 32,
                "block_tokens": 8,
                "kv_tokens": 4096,
                "max_step_tokens": 128,
                "num_threads": 1,
                "keep_finished": keep_finished,
            },
            "store": {"dram_bytes": 64 << 20, **store},
            "cluster": {"num_replicas": replicas, "cpus_per_replica": 0.5, "start_limit_s": 60, "heartbeat_s": 0.3},
        }
    )


def options_for(chats: Path, out: Path, **changes: Any) -> BatchOptions:
    sampling = SamplingParams(max_new_tokens=ANSWER_TOKENS, ignore_eos=True)
    return BatchOptions(input=str(chats), out=str(out), **{"concurrency": 3, "sampling": sampling, **changes})


def answers(out: Path) -> dict[tuple[str, int], list[int]]:
    rows = [json.loads(line) for line in (out / "turns.jsonl").read_text().splitlines()]
    return {(row["conversation_id"], row["turn"]): row["answer_token_ids"] for row in rows}


def wait_until_at_rest(cluster: Running) -> None:
    """Returns when nothing has been on its way between tiers for a moment: what was saved last is on SSD as well."""
    deadline = time.monotonic() + REST_LIMIT_S
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < QUIET_S:
        assert time.monotonic() < deadline, "the store does not come to rest"
        figures = cluster.scheduler_stats()
        if any(figures[name] for name in ("turns_running", "offers_pending", "incoming")):
            quiet_since = time.monotonic()
        time.sleep(0.05)
