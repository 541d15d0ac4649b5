"""A policy experiment in one go, on a trace made here: hit rates by capacity, then simulated runs, then a relived log.

    python examples/policy_experiment.py [FILE.py:CLASS]

Runs the commands of docs/policies.md with `examples/loyal_policy.py:Loyal`, or with the policy you name.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

from cluster.cli import main

LOYAL = f"{Path(__file__).resolve().parent / 'loyal_policy.py'}:Loyal(bonus_s=30)"
TRACE = "zipf:sessions=60,seed=1"
TIMED_TRACE = "chat:sessions=12,seed=1"


def experiment(policy: str, log: str) -> int:
    """The highest exit code of the commands."""
    commands = [
        ["sweep", TRACE, "--capacity", "5,25", "--eviction", policy, "--jobs", "1"],
        ["compare", TIMED_TRACE, "--eviction", policy, "--strict", "--jobs", "1"],
        ["record", log, "--trace", TIMED_TRACE, "--limit", "40", "--eviction", policy],
        ["replay", log],
    ]
    code = 0
    for command in commands:
        print(f"$ reprise lab {shlex.join(command)}", flush=True)
        code = max(code, main(["lab", *command]))
    return code


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(experiment(sys.argv[1] if len(sys.argv) > 1 else LOYAL, str(Path(folder) / "run.jsonl")))
