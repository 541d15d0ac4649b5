"""What may go wrong before, under and behind the page is said in words, and chats go on."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.serving.tenants import open_keyring
from tests.serving.server import Served
from tests.web.conftest import STREAM, expect_complaint, streamed

pytestmark = [pytest.mark.timeout(180)]


def test_a_refusal_is_shown_in_words_and_tried_again(visit):
    one = visit()
    one.page.fill("#message", "word " * 20_000)
    one.page.click("#send")
    assert "leave room for an answer" in one.page.locator("#messages .failure").inner_text()
    expect_complaint(one, "400")
    one.page.locator(".user >> text=Edit").click()
    one.page.fill(".editing textarea", "A shorter one")
    one.page.click(".editing >> text=Send")
    one.page.wait_for_selector(".assistant:not(.running)")
    assert one.page.locator("#messages .failure").count() == 0


def test_an_error_within_a_stream_keeps_the_beginning(visit):
    one = visit()
    broken = streamed("It began ", "well", last='data: {"error":{"message":"the turn could not be answered"}}\n\n')
    one.page.route(STREAM, lambda route: route.fulfill(**broken))
    one.page.fill("#message", "Hello")
    one.page.click("#send")
    assert "The turn could not be answered." in one.page.locator("#messages .failure").inner_text()
    assert one.answers().last.locator(".body").inner_text() == "It began well"


def test_a_stream_that_is_cut_off_and_a_server_that_is_gone(visit):
    one = visit()
    one.page.route(STREAM, lambda route: route.fulfill(**streamed("Half", last="")))
    one.page.fill("#message", "Hello")
    one.page.click("#send")
    assert "ended before the answer did" in one.page.locator("#messages .failure").inner_text()
    one.page.unroute(STREAM)
    one.page.route(STREAM, lambda route: route.abort())
    one.page.fill("#message", "Hello?")
    one.page.click("#send")
    one.page.wait_for_selector("#messages .failure >> text=cannot be reached")
    expect_complaint(one, "ERR_FAILED")
    one.page.unroute(STREAM)
    one.page.click("text=Try again")
    one.page.wait_for_function("() => document.querySelectorAll('.assistant:not(.running)').length === 2")


def test_a_question_without_an_answer_is_replaced_by_the_next(visit):
    one = visit()
    one.page.route(STREAM, lambda route: route.abort())
    one.page.fill("#message", "Lost")
    one.page.click("#send")
    one.page.wait_for_selector("#messages .failure")
    one.page.unroute(STREAM)
    with one.page.expect_request(STREAM) as request:
        one.say("Next")
    assert [message["content"] for message in request.value.post_data_json["messages"]] == ["Next"]
    assert one.page.locator(".branches .figures").inner_text() == "2/2"
    expect_complaint(one, "ERR_FAILED")


def test_a_key_is_asked_for_and_others_see_no_cluster(visit, served: Served, tmp_path: Path, monkeypatch):
    keys = tmp_path / "keys.yaml"
    secret = new_tenant(keys)
    monkeypatch.setattr(served.service, "keyring", open_keyring(str(keys)))
    one = visit()
    one.page.fill("#key", "wrong")
    one.page.press("#key", "Enter")
    one.page.fill("#message", "Hello")
    one.page.click("#send")
    one.page.wait_for_selector("#ask-key >> text=not known here")
    polled: list[str] = []
    one.page.on("request", lambda request: polled.append(request.url) if request.url.endswith("/cluster") else None)
    one.page.fill("#key", secret)
    one.page.press("#key", "Enter")
    one.page.wait_for_selector(".assistant:not(.running)")
    assert one.page.evaluate("sessionStorage.getItem('reprise.key')") == secret
    one.page.wait_for_selector("#strip button")
    assert one.page.locator("#cluster").is_hidden()
    assert polled == []
    expect_complaint(one, "401")
    expect_complaint(one, "403")


def new_tenant(file: Path) -> str:
    """A key of a tenant who is no administrator."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(["keys", "new", "--file", str(file), "--tenant", "alice"])
    return output.getvalue().strip()


def test_damaged_storage_costs_only_what_is_damaged(visit):
    one = visit()
    one.say("Hello")
    damages = ["", "{", "null", "[1]", "7", '{"id": 3}', '{"id": "x", "nodes": [{"id": 1}, null, 7]}']
    for number, damage in enumerate(damages):
        one.page.evaluate("([name, text]) => localStorage[name] = text", [f"reprise.conversation.{number}", damage])
    for name in ("open", "settings"):
        one.page.evaluate("([name, text]) => localStorage[name] = text", [f"reprise.{name}", "{"])
    one.page.reload()
    assert one.page.locator("#conversation-list .open").all_inner_texts() == ["Hello"]
    one.say("Still here?")


def test_full_storage_is_said_and_chats_go_on(visit):
    one = visit()
    one.page.evaluate("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }; 0")
    one.say("Hello")
    assert "storage is full" in one.page.locator("#notice").inner_text()
    one.say("Again")
    assert len(one.questions()) == 2


def test_an_answer_and_a_title_cannot_act(visit):
    one = visit()
    attack = "<img src=x onerror='window.attacked = 1'><script>window.attacked = 1</script>"
    one.page.route(STREAM, lambda route: route.fulfill(**streamed(attack, " [a](javascript:window.attacked=1)")))
    one.page.fill("#message", attack)
    one.page.click("#send")
    one.page.wait_for_selector(".assistant:not(.running)")
    one.page.reload()
    assert one.questions() == [attack]
    assert attack in one.answers().last.locator(".body").inner_text()
    assert one.page.locator("main a, main img, main script, nav img").count() == 0
    assert one.page.evaluate("window.attacked ?? null") is None
