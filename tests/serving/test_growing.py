"""Replicas for which there is no room make an autoscaler add nodes."""

from __future__ import annotations

import pytest

from cluster.bringup import BringUpError, running
from cluster.nodes import spread
from tests.programs import run_program
from tests.serving.server import serving_config


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
    report = run_program("tests.serving.growing", small_model, timeout_s=200)
    assert report == {"asked": [{"CPU": 1.0}, {"CPU": 1.0}], "replicas": [1, 2, 1], "waiting": 0}
