"""Whoever holds an actor's handle imports the file of its class: these must not pull torch in (seconds, and memory)."""

import subprocess
import sys


def test_shells_are_light() -> None:
    code = (
        "import sys; import actors.scheduler, actors.node_store, actors.replica, actors.shard, cluster.client;"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
