"""Whoever holds an actor's handle imports the file of its class: these must not pull torch in (seconds, and memory).

Nor must what brings a cluster up: the keeper of a served one has no use for it at all.
"""

import subprocess
import sys

import pytest

SHELLS = ("actors.scheduler", "actors.node_store", "actors.replica", "actors.shard", "cluster.client")
AROUND = ("cluster.cli", "cluster.bringup", "cluster.batch", "cluster.serving.keeper", "cluster.serving.deployment")


@pytest.mark.parametrize("modules", [SHELLS, AROUND], ids=["shells", "around"])
def test_shells_are_light(modules: tuple[str, ...]) -> None:
    code = f"import sys; import {', '.join(modules)}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
