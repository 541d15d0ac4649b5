"""Sessions over HTTP: where their KV lies, advice, pins, and deletion that leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.serving import admin_api
from tests.serving.server import Served, served_from, serving_config
from tests.serving.test_door import wait_until

pytestmark = [pytest.mark.timeout(120)]

SECRET = "zanzibar-heliotrope"
QUESTION = f"Remember the word {SECRET}, which nobody else may ever see. " * 4


@pytest.fixture
def server(served: Served) -> Served:
    return served


@pytest.fixture
def folder(served: Served) -> Path:
    return served.folder


def chat(server: Served, session: str, *words: str) -> list[dict[str, str]]:
    """A conversation of these user messages; its history."""
    messages: list[dict[str, str]] = []
    for text in words:
        messages.append({"role": "user", "content": text})
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        reply = httpx.post(
            f"{server.url}/v1/chat/completions", json=body, headers={"x-session-id": session}, timeout=60
        )
        assert reply.status_code == 200, reply.text
        messages.append(reply.json()["choices"][0]["message"])
    server.run(server.service.settle())
    return messages


def call(server: Served, method: str, session: str, verb: str = "", **body: Any) -> httpx.Response:
    url = f"{server.url}/reprise/v1/conversations/{session}{verb}"
    return httpx.request(method, url, json=body or None, timeout=60)


def tiers(server: Served, session: str) -> list[list[str]]:
    return [chunk["tiers"] for chunk in call(server, "GET", session).json()["chunks"]]


def own_tiers(server: Served, session: str) -> list[list[str]]:
    """Without the first chunk: others read what the template begins with from it."""
    return tiers(server, session)[1:]


def ssd_files(folder: Path) -> set[Path]:
    return set((folder / "ssd").rglob("*.arrow"))


def forget_hbm(server: Served) -> None:
    """Fills the pool with other chats."""
    for i in range(6):
        chat(server, f"filler-{time.monotonic_ns()}", f"{i} " + "fill the pool with something else " * 150)


def test_a_session_shows_its_turns_and_where_its_kv_lies(server):
    chat(server, "shown", QUESTION, "Again?")
    wait_until(lambda: all("ssd" in where and "dram" in where for where in tiers(server, "shown")))
    shown = call(server, "GET", "shown").json()
    assert shown["id"] == "shown"
    assert shown["turns"] == 2
    last = shown["last"]
    assert last["prompt_tokens"] + last["completion_tokens"] == shown["tokens"]
    assert sum(last["reused"].values()) + sum(last["recomputed"].values()) == last["prompt_tokens"]
    starts = [chunk["start"] for chunk in shown["chunks"]]
    assert starts == list(range(0, shown["tokens"] - 1, 32))
    assert shown["chunks"][-1]["end"] == shown["tokens"] - 1  # the last token has no KV yet
    assert all(chunk["bytes"] > 0 for chunk in shown["chunks"])
    assert all(where[0] == "hbm" for where in tiers(server, "shown"))


def test_an_unknown_session_is_404(server):
    for method, verb in (("GET", ""), ("DELETE", ""), ("POST", "/advise"), ("POST", "/expire")):
        reply = call(server, method, "nobody", verb)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "session_not_found")
    assert call(server, "POST", "nobody", "/pin", seconds=5).status_code == 404
    assert call(server, "POST", "nobody", "/pin", seconds=-1).status_code == 400


def test_a_pin_has_an_end_and_goes_on_with_the_session(server):
    messages = chat(server, "pinned", QUESTION)
    until = call(server, "POST", "pinned", "/pin", seconds=600).json()["pinned_until"]
    assert 590 < until - time.time() <= 600
    chat(server, "pinned", *(m["content"] for m in messages if m["role"] == "user"), "More?")
    assert call(server, "GET", "pinned").json()["pinned_until"] == until
    assert server.cluster.scheduler_stats()["leases"] == 1
    assert call(server, "POST", "pinned", "/pin", seconds=0).json()["pinned_until"] is None
    wait_until(lambda: server.cluster.scheduler_stats()["leases"] == 0)


def test_what_is_expected_is_brought_near(small_model, local_ray, tmp_path):
    config = serving_config(
        small_model,
        tmp_path,
        model={"kv_tokens": 1024},
        store={"dram_bytes": "1MiB"},
        scheduler={"high_watermark": 0.5, "low_watermark": 0.45, "eviction": "policies.eviction:Lru"},
    )
    with served_from(config) as server:
        chat(server, "sleeper", QUESTION)
        wait_until(lambda: all("ssd" in where for where in tiers(server, "sleeper")))
        for i in range(40):
            chat(server, f"other-{i}", f"{i} is another number. " * 12)
            if not any("dram" in where for where in own_tiers(server, "sleeper")):
                break
        assert not any("dram" in where for where in own_tiers(server, "sleeper"))
        assert call(server, "POST", "sleeper", "/advise").status_code == 202
        assert server.cluster.scheduler_stats()["sessions_expected"] == 1
        wait_until(lambda: all("dram" in where for where in tiers(server, "sleeper")))
        chat(server, "sleeper", QUESTION, "I am back.")
        assert server.cluster.scheduler_stats()["sessions_expected"] == 0


def test_what_was_deleted_is_nowhere(server, folder):
    before = ssd_files(folder)
    messages = chat(server, "secret", QUESTION, "And what was it?")
    wait_until(lambda: all("ssd" in where for where in tiers(server, "secret")))
    assert ssd_files(folder) > before
    reply = call(server, "DELETE", "secret")
    assert reply.status_code == 200
    assert reply.json()["chunks"] > 0
    assert reply.json()["chunks_left"] == 0
    assert call(server, "GET", "secret").status_code == 404
    assert ssd_files(folder) <= before
    for file in folder.glob("*.sqlite3*"):
        assert SECRET.encode() not in file.read_bytes()
    body = {"messages": [*messages, {"role": "user", "content": "So?"}], "max_tokens": 4}
    again = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
    assert again["reprise"]["session_id"] != "secret"
    assert again["reprise"]["recomputed"]["deleted"] > 0
    assert again["prompt_tokens_details"]["cached_tokens"] < 32  # what the template begins with, at most


def test_a_session_is_deleted_while_it_speaks(server):
    body = {"messages": [{"role": "user", "content": QUESTION + "speaking"}], "max_tokens": 8}
    headers = {"x-session-id": "speaker"}
    httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    server.run(server.service.settle())
    long = body | {"max_tokens": 1500, "ignore_eos": True, "stream": True}
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=long, headers=headers, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        deleted = call(server, "DELETE", "speaker")
        assert deleted.json()["chunks_left"] == 0
        rest = list(lines)
    assert any('"error"' in line or '"finish_reason":' in line for line in rest)
    wait_until(lambda: server.cluster.scheduler_stats()["turns_running"] == 0)


def test_a_session_whose_first_answer_never_ended_can_be_deleted(server):
    body = {
        "messages": [{"role": "user", "content": QUESTION + "unfinished"}],
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
    }
    headers = {"x-session-id": "unfinished"}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as reply:
        lines = reply.iter_lines()
        while "content" not in next(lines):
            pass
    wait_until(lambda: server.cluster.scheduler_stats()["turns_running"] == 0)
    shown = call(server, "GET", "unfinished").json()
    assert (shown["turns"], shown["last"]) == (0, None)
    wait_until(lambda: all("ssd" in where for where in own_tiers(server, "unfinished")))
    assert own_tiers(server, "unfinished")
    deleted = call(server, "DELETE", "unfinished").json()
    assert deleted["chunks"] > 0
    assert deleted["chunks_left"] == 0
    assert call(server, "GET", "unfinished").status_code == 404


def test_a_session_may_be_expired(server):
    chat(server, "old", QUESTION + "old")
    assert call(server, "POST", "old", "/expire").json() == {"expired": True}


def test_a_session_and_its_system_prompt_have_times_to_live(server):
    system = {"role": "system", "content": "You answer in the manner of a lighthouse keeper on a quiet night. " * 4}
    body = {"messages": [system, {"role": "user", "content": QUESTION}], "max_tokens": 4}
    headers = {"x-session-id": "keeper"}
    httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    server.run(server.service.settle())
    assert call(server, "POST", "keeper", "/lifetime", seconds=600).json() == {"seconds": 600}
    tokens = call(server, "POST", "keeper", "/prefix/lifetime", seconds=3600).json()["tokens"]
    assert 32 < tokens < call(server, "GET", "keeper").json()["tokens"]
    assert server.cluster.scheduler_stats()["prefixes_with_lifetimes"] == 2
    assert call(server, "POST", "keeper", "/prefix/pin", seconds=600).json() == {"tokens": tokens}
    assert server.cluster.scheduler_stats()["leases"] == 1
    assert call(server, "POST", "keeper", "/prefix/expire").json() == {"tokens": tokens}
    assert call(server, "DELETE", "keeper", "/prefix").json() == {"tokens": tokens}
    wait_until(lambda: not any(own_tiers(server, "keeper")))
    for verb in ("/lifetime", "/prefix/lifetime"):
        url = f"{server.url}/reprise/v1/conversations/keeper{verb}"
        assert httpx.post(url, json={"seconds": None}).json()["seconds"] is None
        assert [httpx.post(url, json=bad).status_code for bad in ({"seconds": 0}, {"seconds": "x"}, {})] == [400] * 3
    assert server.cluster.scheduler_stats()["prefixes_with_lifetimes"] == 0
    assert call(server, "POST", "nobody", "/prefix/expire").status_code == 404


def test_the_cluster_in_figures(server):
    shown = httpx.get(f"{server.url}/reprise/v1/cluster").json()
    assert {tier["tier"] for tier in shown["tiers"]} == {"hbm", "dram", "ssd"}
    assert all(0 <= tier["used_bytes"] <= tier["budget_bytes"] for tier in shown["tiers"])
    (replica,) = shown["replicas"]
    assert replica["capacity_turns"] == 8
    assert not replica["closing"]
    with httpx.stream("GET", f"{server.url}/reprise/v1/live", timeout=10) as live:
        line = next(line for line in live.iter_lines() if line.startswith("data: "))
    assert '"tiers"' in line


def test_a_live_view_ends_by_itself(server, monkeypatch):
    monkeypatch.setattr(admin_api, "LIVE_LIMIT_S", 0.5)
    views = httpx.get(f"{server.url}/reprise/v1/live", timeout=20).text  # a shutdown would wait for it
    assert views.count("data: ") == 1
