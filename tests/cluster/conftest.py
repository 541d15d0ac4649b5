"""One cluster for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import bringup
from tests.cluster.jobs import config_for


@pytest.fixture(scope="package")
def cluster(local_ray: None, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bringup.Running]:
    """For all tests that need no special one; with an SSD tier."""
    ssd = tmp_path_factory.mktemp("ssd")
    with bringup.running(config_for(small_model, ssd_url=str(ssd), ssd_bytes=64 << 20)) as running:
        yield running
