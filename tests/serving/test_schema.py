"""Whatever the published OpenAPI allows, and what it does not: never an error of the server's own (schemathesis)."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from cluster.serving import admin_api, api
from tests.serving.server import Served

pytestmark = [pytest.mark.timeout(240)]

ENDLESS = "GET /reprise/v1/live"
LONGEST = 4


def operations() -> list[Any]:
    """Everything that the published OpenAPI names."""
    app = FastAPI()
    app.include_router(api.router)
    app.include_router(admin_api.router)
    found = [result.ok() for result in schemathesis.openapi.from_dict(app.openapi()).get_all_operations()]
    return [operation for operation in found if operation.label != ENDLESS]


def keep_short(body: dict[str, Any]) -> None:
    """What is drawn may ask for answers as long as the window, sixteen at a time: those take minutes."""
    for name in ("max_tokens", "max_completion_tokens"):
        if type(body.get(name)) is int:
            body[name] = min(body[name], LONGEST)
    body.setdefault("max_tokens", 2)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "not allowed"])
@pytest.mark.parametrize("operation", operations(), ids=lambda operation: operation.label)
def test_no_request_is_the_servers_fault(served: Served, operation: Any, mode: GenerationMode) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def send(case: Any) -> None:
        if isinstance(case.body, dict):
            keep_short(case.body)
        reply = case.call(base_url=served.url, timeout=60)
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400 and case.method != "HEAD":
            assert set(reply.json()) == {"error"}

    try:
        send()
    except Unsatisfiable:
        pytest.skip("there is nothing of this kind to send")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b'{"messages": "x"}',
        b'{"messages": [' * 500,
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "\\u0000"}], "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1e400}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 99999999999999999999999}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2147483647, "stop": ["e", "a", " "]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "stop": ["", "a"], "max_tokens": 2}',
        b'{"messages": [{"role": "assistant", "content": "x"}], "max_tokens": 2}',
        b'{"messages": [{"role": "tool", "content": "x"}], "max_tokens": 2}',
        b'{"messages": [{"role": "system", "content": ""}], "max_tokens": 2}',
        b'{"messages": [{"role": "assistant", "tool_calls": [{"x": "\\ud800"}]}], "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": null}, "max_tokens": 2}',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "x"}], "logprobs": true, "top_logprobs": 20, "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "x"}], "stop_token_ids": [9223372036854775807], "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "x"}], "stop_token_ids": [5], "min_tokens": 2, "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "x"}], "top_k": -1, "min_p": 1, "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "x"}], "repetition_penalty": 1e-300, "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": -9223372036854775807, "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "x"}], "conversation_id": "", "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "x"}], "prompt_cache_key": "\\n\\u0000", "max_tokens": 2}',
    ],
)
def test_strange_bodies_are_answered_or_refused(served: Served, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers=headers, timeout=60)
    assert reply.status_code in (200, 400, 422), reply.text
    assert ("choices" in reply.json()) == (reply.status_code == 200)


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": ""}',
        b'{"prompt": []}',
        b'{"prompt": [[]]}',
        b'{"prompt": [1, "a"]}',
        b'{"prompt": [99999999]}',
        b'{"prompt": [-1]}',
        b'{"prompt": ["a", "b", ""], "max_tokens": 2}',
        b'{"prompt": "x", "n": 16, "max_tokens": 1}',
        b'{"prompt": "x", "n": 17}',
        b'{"prompt": "\\ud83d", "max_tokens": 2}',
    ],
)
def test_strange_prompts_are_answered_or_refused(served: Served, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{served.url}/v1/completions", content=content, headers=headers, timeout=60)
    assert reply.status_code in (200, 400), reply.text
