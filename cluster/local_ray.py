"""A Ray head with a dashboard on this machine, for `ray job submit`: started as a child, ended with it.

It listens on loopback only, on free ports, and is ended by its process group: nobody else's Ray is touched.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster import openmp
from cluster.bringup import RAY_SYSTEM_CONFIG, BringUpError

START_LIMIT_S = 90.0
STOP_LIMIT_S = 20.0


@dataclass(frozen=True)
class LocalRay:
    """A running head: where to submit jobs, and the environment its clients need."""

    dashboard_url: str
    environment: dict[str, str]


@contextmanager
def local_ray(object_store_bytes: int) -> Iterator[LocalRay]:
    """Starts a head, yields when it takes jobs, ends it whatever happens. Raises BringUpError."""
    dashboard_port = _free_port()
    environment = _environment()
    with tempfile.TemporaryDirectory(prefix="reprise-ray-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "head.log"
        with log.open("wb") as output:
            head = subprocess.Popen(
                _command(dashboard_port, object_store_bytes, folder),
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            url = f"http://127.0.0.1:{dashboard_port}"
            _wait_until_ready(url, head, log)
            yield LocalRay(url, environment)
        finally:
            _stop(head)


def _command(dashboard_port: int, object_store_bytes: int, folder: str) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--node-ip-address=127.0.0.1",
        f"--port={_free_port()}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
        f"--object-store-memory={object_store_bytes}",
        f"--temp-dir={folder}",
        f"--system-config={json.dumps(RAY_SYSTEM_CONFIG)}",
    ]


def _environment() -> dict[str, str]:
    ours = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{ours}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        **openmp.WAITING,
    }


def _wait_until_ready(url: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise BringUpError(f"ray start ended with code {head.returncode}: {_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/api/version", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    raise BringUpError(f"the Ray dashboard did not answer within {START_LIMIT_S:.0f} s: {_tail(log)}")


def _stop(head: subprocess.Popen[bytes]) -> None:
    """First asks `ray start --block` to end what it started, then ends what is left of its process group."""
    if head.poll() is None:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(STOP_LIMIT_S)
    try:
        os.killpg(head.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    if head.poll() is None:
        head.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
