"""A new version of the application, deployed while clients talk."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from cluster.config import Config
from cluster.serving.deployment import build
from tests.serving.server import serving_config
from tests.serving.test_serve_command import free_port

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(480)]

LIMIT_S = 120.0
LONG_TOKENS = 2000


@pytest.fixture(scope="module")
def url(local_ray: None, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    deploy(small_model, tmp_path_factory.getbasetemp(), default_max_tokens=5)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def deploy(model: Path, folder: Path, **serving: Any) -> None:
    """With two front processes: in an update one still talks to the old cluster while the other waits for the new."""
    config: Config = serving_config(model, folder, serving={"num_fronts": 2, "drain_s": 60.0} | serving)
    serve.run(build(config), name="reprise", route_prefix="/")


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Go on"}], **fields}


def ask(client: Any, url: str) -> tuple[int, Any]:
    reply = client.post(f"{url}/v1/chat/completions", json=body(), timeout=LIMIT_S)
    return reply.status_code, reply.json()


@dataclass(eq=False)
class Talk(threading.Thread):
    """Short questions, one after the other, until it is told to stop."""

    url: str
    codes: list[int] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__()

    def run(self) -> None:
        with httpx.Client() as client:
            while not self.is_over.wait(0.1):
                self.codes.append(ask(client, self.url)[0])


@dataclass(eq=False)
class Stream(threading.Thread):
    """One long answer."""

    url: str
    lines: list[str] = field(default_factory=list)
    has_begun: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__()

    def run(self) -> None:
        asked = body(max_tokens=LONG_TOKENS, ignore_eos=True, stream=True, stream_options={"include_usage": True})
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=asked, timeout=LIMIT_S) as reply:
            for line in filter(None, reply.iter_lines()):
                self.has_begun.set()
                self.lines.append(line)


def test_an_update_loses_no_answer(url, small_model, tmp_path):
    stream, talks = Stream(url), [Talk(url) for _ in range(4)]
    for thread in (stream, *talks):
        thread.start()
    assert stream.has_begun.wait(60)
    deploy(small_model, tmp_path, default_max_tokens=7)
    for talk in talks:
        talk.is_over.set()
    for thread in (stream, *talks):
        thread.join(LIMIT_S)
    assert {code for talk in talks for code in talk.codes} == {200}
    assert stream.lines[-1] == "data: [DONE]"
    assert json.loads(stream.lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == LONG_TOKENS
    code, answer = ask(httpx, url)
    assert (code, answer["usage"]["completion_tokens"]) == (200, 7)
