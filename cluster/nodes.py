"""The nodes of a Ray cluster: which replicas fit where, and asking an autoscaler for more of them.

Nodes are as `ray.nodes()` tells of them; what a replica takes is its shard's CPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

Node = dict[str, Any]


def alive_nodes() -> list[Node]:
    return [node for node in ray.nodes() if node["Alive"]]


def spread(nodes: Sequence[Node], taken: Sequence[str], count: int, cpus: float, gpus: float) -> list[Node]:
    """Nodes for so many more replicas, or for as many as fit: each goes where the fewest are.

    `taken` are the ids of the nodes that the present replicas are on, one for each of them.
    """
    free = {node["NodeID"]: dict(node["Resources"]) for node in nodes}
    for node_id in taken:
        if node_id in free:
            _take(free[node_id], cpus, gpus)
    places: list[Node] = []
    while len(places) < count:
        fitting = [node for node in nodes if _fits(free[node["NodeID"]], cpus, gpus)]
        if not fitting:
            break
        node = min(fitting, key=lambda node: places.count(node) + taken.count(node["NodeID"]))
        _take(free[node["NodeID"]], cpus, gpus)
        places.append(node)
    return places


class Wish:
    """Room for replicas that find none: placement groups that wait, which an autoscaler sees and adds nodes for.

    One that is granted holds the room; it must be given back when replicas are placed there. They belong to this
    process: Ray drops them when it ends.
    """

    def __init__(self, cpus: float, gpus: float) -> None:
        """What one replica takes."""
        self._bundle = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        self._groups: list[PlacementGroup] = []

    def set(self, count: int) -> None:
        """So many replicas have no room."""
        while len(self._groups) > count:
            remove_placement_group(self._groups.pop(0))  # the longest waiting one is the first to be granted
        while len(self._groups) < count and self._bundle:
            self._groups.append(placement_group([self._bundle]))


def _take(resources: dict[str, float], cpus: float, gpus: float) -> None:
    resources["CPU"] = resources.get("CPU", 0) - cpus
    resources["GPU"] = resources.get("GPU", 0) - gpus


def _fits(resources: dict[str, float], cpus: float, gpus: float) -> bool:
    return resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= gpus
