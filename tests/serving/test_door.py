"""What passes the door, and what does not: huge bodies, slow clients, strange headers, clients that go away."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest

from cluster.serving import door
from tests.serving.server import Served

pytestmark = [pytest.mark.timeout(120)]

SETTLE_LIMIT_S = 20.0


def body(**fields: Any) -> bytes:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    return json.dumps(asked | fields).encode()


def raw(served: Served, *parts: bytes, pause_s: float = 0.0) -> socket.socket:
    """A connection on which these bytes were sent."""
    where = urlparse(served.url)
    assert where.hostname is not None
    connection = socket.create_connection((where.hostname, where.port or 80), timeout=30)
    for part in parts:
        connection.sendall(part)
        time.sleep(pause_s)
    return connection


def head(length: int) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json"]
    return "\r\n".join([*lines, f"content-length: {length}", "", ""]).encode()


def slots_in_use(served: Served) -> int:
    stats = served.cluster.scheduler_stats()
    return int(stats["turns_running"] + stats["turns_waiting"])


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not settle"
        time.sleep(0.05)


def test_a_body_that_says_it_is_huge_is_refused_at_once(served):
    limit = served.service.section.max_body_bytes
    with raw(served, head(limit + 1)) as connection:
        assert b" 413 " in connection.recv(200)


def test_a_body_that_turns_out_huge_is_refused(served):
    limit = served.service.section.max_body_bytes

    def pieces() -> Iterator[bytes]:
        for _ in range(limit // (1 << 20) + 2):
            yield b" " * (1 << 20)

    reply = httpx.post(
        f"{served.url}/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"}, timeout=30
    )
    assert reply.status_code == 413
    assert "larger than" in reply.json()["error"]["message"]


def test_a_client_that_never_sends_its_body_is_told(served, monkeypatch):
    monkeypatch.setattr(door, "BODY_LIMIT_S", 0.5)
    with raw(served, head(100), b'{"mess') as connection:
        began = time.monotonic()
        reply = connection.recv(4096)
        assert b" 408 " in reply
        assert time.monotonic() - began < 10


def test_a_slow_but_honest_client_is_answered(served):
    words = body()
    with raw(served, head(len(words)), words[:10], words[10:30], words[30:], pause_s=0.1) as connection:
        assert b" 200 " in connection.recv(200)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1, 0.3])
def test_a_client_may_go_at_any_moment(served, stream, after_s):
    wait_until(lambda: slots_in_use(served) == 0)
    words = body(max_tokens=2000, stream=stream, ignore_eos=True)
    connection = raw(served, head(len(words)) + words)
    time.sleep(after_s)
    connection.close()
    began = time.monotonic()
    wait_until(lambda: slots_in_use(served) == 0 and served.service.num_running == 0)
    assert time.monotonic() - began < 10  # 2,000 tokens would take longer
    aborts = 'reprise_request_success_total{finished_reason="abort",front="0"}'
    assert served.service.num_running == 0
    if after_s:  # before that the turn may not have begun
        assert aborts in httpx.get(f"{served.url}/metrics").text
    stats = served.cluster.replica_stats()[0]
    assert stats["turns_running"] + stats["turns_queued"] + stats["turns_restoring"] == 0


def test_a_client_may_go_in_the_middle_of_its_body(served):
    connection = raw(served, head(100), b'{"messages"')
    connection.close()
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_health_turns_bad_when_the_engine_hangs_and_good_again(served):
    (stats,) = served.cluster.replica_stats()
    with httpx.stream(
        "POST",
        f"{served.url}/v1/chat/completions",
        content=body(max_tokens=800, stream=True, ignore_eos=True),
        headers={"content-type": "application/json"},
        timeout=60,
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        os.kill(stats["pid"], signal.SIGSTOP)  # the engine's own process: it makes no step any more
        try:
            bad = httpx.get(f"{served.url}/health", timeout=30)
        finally:
            os.kill(stats["pid"], signal.SIGCONT)
        assert bad.status_code == 503
        assert "no engine has made a step" in bad.json()["error"]["message"]
        assert sum('"finish_reason":"length"' in line for line in lines) == 1
    assert httpx.get(f"{served.url}/health", timeout=30).status_code == 200


def test_a_front_with_the_tokens_of_another_model_answers_nobody(served):
    connection, state = served.service.connection, served.service.connection.state
    key_space = state.model.key_space.salted("another model")
    client = connection.client
    connection.adopt(replace(state, bring_up="next", model=replace(state.model, key_space=key_space)))
    try:
        asked = httpx.post(
            f"{served.url}/v1/chat/completions", content=body(), headers={"content-type": "application/json"}
        )
        assert (asked.status_code, asked.json()["error"]["code"]) == (503, "outdated")
        assert int(asked.headers["retry-after"]) >= 1
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert "another model" in client._obstacle  # who waits for the next cluster fails
    finally:
        connection.adopt(state)
        client.move(state.scheduler, state.model)
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_every_answer_names_its_request_and_takes_a_sensible_name(served):
    given = httpx.get(f"{served.url}/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"]
    made = httpx.get(f"{served.url}/health", headers={"x-request-id": "x" * 500}).headers["x-request-id"]
    assert given == "mine-1"
    assert made.startswith("req-")


def test_a_request_that_may_not_take_long_ends_in_time(served):
    reply = httpx.post(
        f"{served.url}/v1/chat/completions",
        content=body(max_tokens=4000, ignore_eos=True),
        headers={"content-type": "application/json", "x-request-timeout": "0.2"},
        timeout=30,
    )
    assert reply.status_code == 504
    assert reply.json()["error"]["type"] == "timeout_error"
    wait_until(lambda: slots_in_use(served) == 0)
    for wrong in ("soon", "-1", "nan"):
        reply = httpx.post(
            f"{served.url}/v1/chat/completions",
            content=body(),
            headers={"content-type": "application/json", "x-request-timeout": wrong},
        )
        assert reply.status_code == 400


def test_too_many_waiting_turns_are_refused_with_a_time(served, monkeypatch):
    monkeypatch.setattr(served.service.connection.client, "_max_waiting", 2)

    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=40)) as client:
            asked = {"content": body(max_tokens=60, ignore_eos=True), "headers": {"content-type": "application/json"}}
            return await asyncio.gather(*(client.post(f"{served.url}/v1/chat/completions", **asked) for _ in range(24)))

    replies = asyncio.run(all_of_them())
    codes = {reply.status_code for reply in replies}
    assert codes == {200, 429}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
