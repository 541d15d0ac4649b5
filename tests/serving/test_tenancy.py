"""Tenants over HTTP: nobody without a key, nobody else's memory, no more than one's share."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from cluster.cli import main
from tests.serving.server import Served, served_from, serving_config

pytestmark = [pytest.mark.timeout(180)]

QUESTION = "Which way to the harbour, and is it far from the old gate? " * 4


def new_key(file: Path, tenant: str, *more: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["keys", "new", "--file", str(file), "--tenant", tenant, *more]) == 0
    return out.getvalue().strip()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {name: new_key(file, name) for name in ("alice", "bob", "carol")}
    made["root"] = new_key(file, "root", "--admin")
    tree = yaml.safe_load(file.read_text())
    next(entry for entry in tree["tenants"] if entry["name"] == "carol")["requests_per_minute"] = 2
    file.write_text(yaml.safe_dump(tree))
    return file, made


@pytest.fixture(scope="module")
def closed(
    local_ray: None, small_model: Path, keys: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    config = serving_config(small_model, tmp_path_factory.mktemp("closed"), serving={"keys_file": str(keys[0])})
    with served_from(config) as server:
        yield server


def client(server: Served, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def ask(server: Served, key: str, messages: list[Any] | None = None) -> Any:
    asked = messages or [{"role": "user", "content": QUESTION}]
    return client(server, key).chat.completions.create(model="small", messages=asked, max_tokens=6, temperature=0)


def test_without_a_key_nothing_is_answered(closed, keys):
    for wrong in ("", "rk-nonsense", keys[1]["alice"] + "x"):
        headers = {"authorization": f"Bearer {wrong}"} if wrong else {}
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/reprise/v1/cluster")):
            content = b'{"messages": [{"role": "user", "content": "x"}]}' if method == "POST" else None
            reply = httpx.request(
                method, closed.url + path, content=content, headers={**headers, "content-type": "application/json"}
            )
            assert reply.status_code == 401, (method, path)
            assert reply.json()["error"]["code"] == "invalid_api_key"
            if wrong:
                assert wrong not in reply.text
    assert httpx.get(f"{closed.url}/health").status_code == 200
    assert httpx.get(f"{closed.url}/reprise/v1/info").json()["auth_required"] is True


def test_tenants_share_no_chunks_and_no_histories(closed, keys):
    made = keys[1]
    first = ask(closed, made["alice"])
    again = ask(closed, made["alice"])
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    theirs = ask(closed, made["bob"])
    assert theirs.usage.prompt_tokens_details.cached_tokens == 0
    assert theirs.choices[0].message.content == first.choices[0].message.content
    history = [{"role": "user", "content": QUESTION}, first.choices[0].message, {"role": "user", "content": "So?"}]
    assert ask(closed, made["alice"], history).usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens
    session = first.usage.model_extra["reprise"]["session_id"]
    headers = {"authorization": f"Bearer {made['bob']}"}
    assert httpx.get(f"{closed.url}/reprise/v1/conversations/{session}", headers=headers).status_code == 404


def test_only_administrators_see_the_cluster(closed, keys):
    for name, status in (("alice", 403), ("root", 200)):
        headers = {"authorization": f"Bearer {keys[1][name]}"}
        reply = httpx.get(f"{closed.url}/reprise/v1/cluster", headers=headers)
        assert reply.status_code == status, reply.text


def test_a_quota_says_when_to_come_again(closed, keys):
    carol = keys[1]["carol"]
    ask(closed, carol)
    ask(closed, carol)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(closed, carol)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "quota_exceeded"
    ask(closed, keys[1]["alice"])


def test_secrets_are_in_no_metric(closed, keys):
    text = httpx.get(f"{closed.url}/metrics").text
    assert 'tenant="alice"' in text
    assert "reprise_time_to_first_token_seconds" in text
    assert not any(key in text for key in keys[1].values())
    assert "sha256" not in text


def test_a_tenant_steers_its_own_memory_and_an_administrator_anybodys(closed, keys):
    made = keys[1]

    def call(key: str, method: str, path: str, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {made[key]}"}
        return httpx.request(method, f"{closed.url}/reprise/v1/tenants/{path}", json=body or None, headers=headers)

    ask(closed, made["bob"])
    assert call("bob", "POST", "me/lifetime", seconds=60).json() == {"seconds": 60}
    assert call("bob", "POST", "bob/expire").json() == {"expired": True}
    for method, path, body in (
        ("POST", "alice/lifetime", {"seconds": 60}),
        ("POST", "alice/expire", {}),
        ("DELETE", "alice/memory", {}),
        ("POST", "me/pin", {"seconds": 60}),
    ):
        assert call("bob", method, path, **body).status_code == 403, path
    assert call("root", "POST", "nobody/expire").json()["error"]["code"] == "tenant_not_found"
    assert call("root", "POST", "bob/pin", seconds=60).status_code == 200
    assert call("root", "POST", "bob/pin", seconds=-1).status_code == 400
    assert call("root", "DELETE", "bob/memory").json() == {"deleted": True}
    again = ask(closed, made["bob"])
    assert again.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.reprise["recomputed"]["deleted"] > 0
