"""One server for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.server import Served, served_from, serving_config


@pytest.fixture(scope="package")
def served(local_ray: None, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with one replica, DRAM and SSD, open to everybody."""
    with served_from(serving_config(small_model, tmp_path_factory.mktemp("served"))) as server:
        yield server
