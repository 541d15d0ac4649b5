"""Shared by all tests: one local Ray cluster for the shells, small models made once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before ray and torch are imported anywhere.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_worker_niceness", "0")  # as equals of the tests beside them, not after those
for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    os.environ.setdefault(name, "testing")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

MIB = 1 << 20
LONGEST = ("tests/cluster", "tests/serving", "tests/web", "tests/bench")
"""Folders with long tests: begun first, so that no process is left with one of them at the end."""
TOGETHER = {
    "tests/serving": ("test_administration.py", "test_door.py", "test_openai_client.py", "test_schema.py"),
    "tests/web": ("test_access.py", "test_failures.py", "test_markdown.py", "test_memory.py", "test_page.py"),
}
"""Files that use their folder's server: apart, each would start one for itself."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`pytest -n 2`: a file is run by one process, and so are those that share a server."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder, _, name = file.rpartition("/")
            return folder if name in TOGETHER.get(folder, ()) else file

    return ByServer(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {folder: rank for rank, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0].rpartition("/")[0], len(LONGEST)))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray cluster of one node with a small object store; one that runs already is used and left alone."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=256 * MIB,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _system_config={"automatic_object_spilling_enabled": False, "free_objects_period_milliseconds": 0},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of about a million parameters, fp32."""
    from cluster.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("models") / "small"
    make_tiny_model(folder, size="test", dtype="float32", seed=0)
    return folder
