"""What a cluster tells of itself while its actors come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from cluster import bringup
from cluster.bringup import _stats_of as stats_of
from tests.cluster.jobs import config_for


def test_figures_wait_for_who_restarts_and_leave_out_who_is_gone(local_ray: None, small_model: Path) -> None:
    with bringup.running(config_for(small_model)) as cluster:
        (store,) = cluster.stores.values()
        ray.kill(store, no_restart=False)
        assert [figures["saved_bytes"] for figures in cluster.store_stats()] == [0]
        ray.kill(store, no_restart=True)
        assert cluster.store_stats() == []
        assert len(cluster.replica_stats()) == 1


def test_what_goes_wrong_in_figures_is_not_hidden(local_ray: None) -> None:
    @ray.remote(num_cpus=0)
    class Broken:
        def stats(self) -> None:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stats_of({"store": Broken.remote()})
