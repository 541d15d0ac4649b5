"""What a client may call its requests: names of sessions tell conversations apart, hints only place their turns."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from actors.wire import TurnRequest
from cluster.client import Answer
from tests.serving.server import Served

pytestmark = [pytest.mark.timeout(120)]


@pytest.fixture
def submitted(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[TurnRequest]:
    """What goes to the cluster's client, on its way."""
    found: list[TurnRequest] = []
    run = served.service.connection.client.run

    async def listen(request: TurnRequest, **rest: Any) -> Answer:
        found.append(request)
        return await run(request, **rest)

    monkeypatch.setattr(served.service.connection.client, "run", listen)
    return found


def ask(served: Served, words: str, headers: dict[str, str] | None = None, **fields: Any) -> str:
    """The session of the answer."""
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 2, **fields}
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    return str(reply.headers["x-reprise-session"])


def test_names_of_sessions(served, submitted):
    assert ask(served, "one", {"x-session-id": "mine"}) == "mine"
    assert ask(served, "two", conversation_id="mine too") == "mine too"
    assert ask(served, "three", {"x-session-id": "first"}, conversation_id="second") == "first"
    assert {request.affinity for request in submitted} == {None}
    assert len({request.session_id for request in submitted}) == 3


@pytest.mark.parametrize("hint", [{"prompt_cache_key": "helpdesk"}, {"headers": {"x-user-id": "helpdesk"}}])
def test_a_hint_is_no_name(served, submitted, hint):
    sessions = [ask(served, words, **hint) for words in ("a hint", "another hint")]
    assert len(set(sessions)) == 2
    assert ask(served, "no hint") not in sessions
    one, same, none = [request.affinity for request in submitted]
    assert one == same
    assert one is not None
    assert "helpdesk" not in one
    assert none is None
    assert httpx.get(f"{served.url}/reprise/v1/conversations/helpdesk").status_code == 404


def test_the_nearer_hint_counts(served, submitted):
    ask(served, "x", {"x-user-id": "someone"}, prompt_cache_key="helpdesk")
    ask(served, "y", prompt_cache_key="helpdesk")
    ask(served, "z", {"x-user-id": "someone"})
    by_both, by_key, by_user = [request.affinity for request in submitted]
    assert by_both == by_key != by_user
