"""Replicas for which there is no room make an autoscaler add nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.bringup import BringUpError, running
from cluster.nodes import spread
from tests.serving.server import serving_config

ROOT = Path(__file__).resolve().parents[2]


def node(name: str, cpus: float, gpus: float = 0) -> dict[str, object]:
    return {"NodeID": name, "Resources": {"CPU": cpus, "GPU": gpus}}


def test_replicas_go_where_the_fewest_are_as_far_as_they_fit():
    nodes = [node("a", 8, 2), node("b", 8, 1), node("c", 8)]
    assert [place["NodeID"] for place in spread(nodes, [], 4, 1, 1)] == ["a", "b", "a"]
    assert [place["NodeID"] for place in spread(nodes, ["a", "gone"], 4, 1, 1)] == ["b", "a"]
    assert spread(nodes, [], 2, 9, 0) == []


def test_what_does_not_fit_is_said_when_nobody_is_waited_for(local_ray, small_model, tmp_path):
    config = serving_config(small_model, tmp_path, cluster={"num_replicas": 2, "cpus_per_replica": 2})
    with pytest.raises(BringUpError, match=r"2 replicas do not fit.*node_wait_s"), running(config):
        pass


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nodes_come_when_replicas_have_no_room(small_model):
    run = subprocess.run(
        [sys.executable, "-m", "tests.serving.growing", str(small_model)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.strip().splitlines()[-1])
    assert report == {"asked": [{"CPU": 1.0}, {"CPU": 1.0}], "replicas": [1, 2, 1], "waiting": 0}
