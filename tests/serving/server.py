"""A real server for tests: cluster, service and HTTP, the latter in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from actors.engine.tokenizer import load_tokenizer
from cluster.bringup import Running, running
from cluster.chat import ChatFormat
from cluster.config import Config, config_from
from cluster.serving.api import create_app
from cluster.serving.connection import Connection
from cluster.serving.keeper import cluster_state, start_history
from cluster.serving.metrics import Metrics
from cluster.serving.service import Service
from cluster.serving.tenants import open_keyring

START_LIMIT_S = 20.0


@dataclass
class Served:
    """A server that answers at `url`."""

    url: str
    service: Service
    cluster: Running
    loop: asyncio.AbstractEventLoop
    tokenizer: Any = field(repr=False)

    @property
    def folder(self) -> Path:
        """Where its SSD tier and its conversations lie."""
        assert self.cluster.config.store.ssd_url is not None
        return Path(self.cluster.config.store.ssd_url).parent

    def run(self, work: Any) -> Any:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


def serving_config(model_path: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    """Small, with an SSD tier in `folder`."""
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "path": str(model_path),
            "chunk_tokens": 32,
            "block_tokens": 16,
            "kv_tokens": 8192,
            "num_threads": 1,
        },
        "store": {"dram_bytes": "32MiB", "ssd_url": str(folder / "ssd"), "ssd_bytes": "256MiB"},
        "cluster": {"cpus_per_replica": 0.5},
        "serving": {"default_max_tokens": 16},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return config_from(tree)


@contextmanager
def served_from(config: Config) -> Iterator[Served]:
    """The cluster, and HTTP on a free port of loopback."""
    with running(config) as cluster:
        history = start_history(config)
        tokenizer = load_tokenizer(config.model.path)
        service = Service(
            section=config.serving,
            connection=Connection(cluster_state(cluster, history), config.serving.max_waiting_turns),
            chat=ChatFormat(tokenizer),
            keyring=open_keyring(config.serving.keys_file),
            metrics=Metrics(),
        )
        with _http(service) as (url, loop):
            yield Served(url, service, cluster, loop, tokenizer)


@contextmanager
def _http(service: Service) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # asyncio sends at once on such sockets only
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(service), log_level="warning", lifespan="off", timeout_keep_alive=75)
    )
    loops: list[asyncio.AbstractEventLoop] = []
    ready = threading.Event()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        ready.set()
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(START_LIMIT_S)
    deadline = time.monotonic() + START_LIMIT_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", loops[0]
    finally:
        server.should_exit = True
        thread.join(START_LIMIT_S)
        listener.close()
