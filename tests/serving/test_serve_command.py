"""`reprise serve` as its users run it: through Ray Serve, interrupted while it answers, and started again."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import ray.serve

from cluster.bringup import BringUpError
from cluster.serving.command import _start as start

pytestmark = [pytest.mark.timeout(480)]

START_LIMIT_S, END_LIMIT_S = 180.0, 60.0
SYSTEM = {"role": "system", "content": "You are a careful guide through a city that nobody knows. " * 4}


def test_a_proxy_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(ray.serve, "start", fail)
    with pytest.raises(BringUpError, match=r"proxy did not start \(.*\): its log is in") as raised:
        start(None, "127.0.0.1", 8000)
    assert "\n" not in str(raised.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(model: Path, folder: Path, port: int) -> list[str]:
    settings = {
        "store.ssd_url": folder / "ssd",
        "store.dram_bytes": "64MiB",
        "model.kv_tokens": 8192,
        "model.chunk_tokens": 32,
        "model.num_threads": 1,
    }
    pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "cluster.cli", "serve", "--model", str(model), "--port", str(port), *pairs]


@contextmanager
def server(model: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """A running `reprise serve`; interrupted at the end, if it still runs."""
    port, log = free_port(), folder / f"serve-{time.monotonic_ns()}.log"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(model, folder, port),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}", process, log
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(log.read_text())


def leave(url: str, *, stream: bool) -> None:
    """A client that goes in the middle of its answer ends its turn, behind Serve's proxy, too."""
    before = num_aborted(url)
    asked = {
        "messages": [{"role": "user", "content": "Go on"}],
        "max_tokens": 100_000,
        "ignore_eos": True,
        "stream": stream,
    }
    timeout = httpx.Timeout(30, read=None if stream else 0.5)
    with (
        suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=timeout) as reply,
    ):
        next(reply.iter_lines())
    deadline = time.monotonic() + 10  # the whole answer would take longer
    while num_aborted(url) == before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    replicas = httpx.get(f"{url}/reprise/v1/cluster", timeout=30).json()["replicas"]
    assert [replica["running"] for replica in replicas] == [0]


def num_aborted(url: str) -> int:
    text = httpx.get(f"{url}/metrics", timeout=30).text
    lines = re.findall(r'reprise_request_success_total\{finished_reason="abort".*\} (\d+)', text)
    return sum(map(int, lines))


def test_conversations_survive_an_interrupt_and_a_restart(small_model, tmp_path):
    asked: dict[str, Any] = {"model": small_model.name, "max_tokens": 24, "temperature": 0.8, "seed": 4}
    messages: list[Any] = [SYSTEM, {"role": "user", "content": "How far is the harbour from the old gate?"}]
    with server(small_model, tmp_path) as (url, process, log):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        first = client.chat.completions.create(messages=messages, **asked)
        assert len(httpx.get(f"{url}/health", headers={"x-request-id": "one"}).headers.get_list("x-request-id")) == 1
        for stream in (True, False, True, False, True, True):
            leave(url, stream=stream)
        known = httpx.get(
            f"{url}/reprise/v1/conversations/{first.usage.model_extra['reprise']['session_id']}", timeout=30
        )
        assert known.status_code == 200, "a cancelled request has stopped the conversations' actor"
        messages += [first.choices[0].message, {"role": "user", "content": "And on foot?"}]
        pieces: list[str] = []
        finish: list[str] = []
        begun = threading.Event()

        def listen() -> None:
            for chunk in client.chat.completions.create(messages=messages, stream=True, **{**asked, "max_tokens": 400}):
                begun.set()
                for choice in chunk.choices:
                    pieces.append(choice.delta.content or "")
                    finish.extend([choice.finish_reason] if choice.finish_reason else [])

        thread = threading.Thread(target=listen)
        thread.start()
        assert begun.wait(30)
        process.send_signal(signal.SIGINT)  # while the answer is being streamed
        thread.join(END_LIMIT_S)
        assert finish in (["length"], ["stop"]), log.read_text()
        assert process.wait(END_LIMIT_S) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    messages += [{"role": "assistant", "content": "".join(pieces)}, {"role": "user", "content": "And back?"}]
    with server(small_model, tmp_path) as (url, process, log):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        third = client.chat.completions.create(messages=messages, **asked)
        told = third.usage.model_extra["reprise"]
        assert told["session_id"] == first.usage.model_extra["reprise"]["session_id"]
        assert told["drift_at"] is None
        assert set(told["reused"]) == {"ssd"}
        found = told["reused"]["ssd"] + told["recomputed"].get("computed_sooner", 0)  # a small model is a fast one
        assert found > third.usage.prompt_tokens * 0.9
        process.send_signal(signal.SIGTERM)  # as systemd and Kubernetes do
        assert process.wait(END_LIMIT_S) == 0, log.read_text()
        assert "waiting for running turns to end" in log.read_text()


def test_what_cannot_be_served_is_said_in_one_line(small_model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = command(small_model, tmp_path, taken.getsockname()[1])
        ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "cannot listen on 127.0.0.1" in ended.stderr
    words = command(tmp_path / "nothing", tmp_path, free_port())
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "no model folder" in ended.stderr
    assert ended.stderr.count("\n") == 1
    words = command(small_model, tmp_path, 99_999)
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "--port must be between" in ended.stderr
