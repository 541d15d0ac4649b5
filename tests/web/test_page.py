"""The page in a real browser, before a real server: conversations, their branches, their storage."""

from __future__ import annotations

import re
import time

import pytest

from tests.web.conftest import LONG, STREAM

pytestmark = [pytest.mark.timeout(180)]


def test_a_question_is_answered_while_it_streams(visit):
    one = visit()
    one.set(max_tokens=300)  # a fast model's, in many frames
    one.page.evaluate("""() => {
        window.lengths = new Set();
        new MutationObserver(() => {
            const body = document.querySelector('.running .body');
            if (body) window.lengths.add(body.textContent.length);
        }).observe(document.getElementById('messages'), {childList: true, subtree: true, characterData: true});
    }""")
    answer = one.say("Hello")
    assert len(answer.split()) > 5
    assert one.page.evaluate("window.lengths.size") > 3
    assert one.questions() == ["Hello"]
    assert one.page.locator("#title").inner_text() == "Hello"
    assert answer[:20].strip() in one.page.locator("#announcer").inner_text()


def test_the_second_turn_reuses_the_first(visit):
    one = visit()
    one.say(LONG)
    one.say("And then?")
    assert re.search(r"[1-9]\d* of \d+ tokens reused", one.page.locator("#memory-summary").text_content())
    origins = one.page.locator(".origins").inner_text()
    assert "reused from HBM" in origins
    assert "computed: new text" in origins
    assert "First word after" in one.page.locator(".speed").inner_text()
    [kept] = one.stored()
    assert sum(kept["nodes"][-1]["figures"]["reused"].values()) > 100


def test_requests_name_the_conversation_and_what_was_set(visit):
    one = visit()
    one.set(system="Be brief.", temperature=0, max_tokens=5)
    with one.page.expect_request(STREAM) as request:
        one.say("Hello")
    body = request.value.post_data_json
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (body["temperature"], body["max_tokens"]) == (0, 5)
    session = request.value.headers["x-session-id"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", session)
    assert one.stored()[0]["id"] == session
    assert "limit of tokens" in one.answers().last.inner_text()


def test_a_reload_keeps_the_conversation(visit):
    one = visit()
    answer = one.say("Hello")
    one.page.reload()
    assert one.questions() == ["Hello"]
    assert one.answers().last.locator(".body").inner_text() == answer
    assert one.page.locator(".origins").is_visible()
    one.say("Again")
    assert len(one.questions()) == 2


def test_several_conversations_stay_apart(visit):
    one = visit()
    one.say("The first one")
    one.page.click("#new-conversation")
    assert one.questions() == []
    one.page.fill("#message", "A draft")
    one.page.click("text=The first one")
    assert one.questions() == ["The first one"]
    assert one.page.input_value("#message") == ""
    one.page.click("#new-conversation")
    assert one.page.input_value("#message") == "A draft"
    one.say("The second one")
    assert len({kept["id"] for kept in one.stored()}) == 2
    assert one.page.locator("#conversation-list .open").all_inner_texts() == ["The second one", "The first one"]


def test_one_conversation_is_answered_while_another_is_read(visit):
    one = visit()
    one.set(max_tokens=200)
    one.page.fill("#message", "A long one")
    one.page.press("#message", "Enter")
    one.page.wait_for_selector("#stop", state="visible")
    one.page.click("#new-conversation")
    one.set(max_tokens=4)
    one.say("A short one")
    one.page.click("#conversation-list .open >> text=A long one")
    one.page.wait_for_selector(".assistant:not(.running)")
    one.page.wait_for_selector("#send", state="visible")
    assert len(one.stored()) == 2


def test_stop_keeps_what_has_come(visit, served):
    one = visit()
    one.set(max_tokens=3000)
    one.page.fill("#message", "Hello")
    one.page.click("#send")
    one.page.wait_for_function("() => document.querySelector('.running .body')?.textContent.length > 20")
    one.page.click("#stop")
    one.page.wait_for_selector("#send", state="visible")
    assert "Stopped here." in one.answers().last.inner_text()
    [kept] = one.stored()
    [answer] = [node for node in kept["nodes"] if node["role"] == "assistant"]
    assert len(answer["content"]) > 20  # as it came; what is shown of it may be less, white space and marks of Markdown
    deadline = time.monotonic() + 20
    while served.cluster.scheduler_stats()["turns_running"]:
        assert time.monotonic() < deadline, "the server goes on"
        time.sleep(0.05)
    one.set(max_tokens=4)
    one.say("Go on")


def test_an_edit_makes_a_branch(visit):
    one = visit()
    first = one.say("The first version")
    one.page.locator(".user >> text=Edit").click()
    one.page.fill(".editing textarea", "The other version")
    one.page.press(".editing textarea", "Enter")
    one.page.wait_for_function("() => document.querySelector('.assistant:not(.running)')")
    assert one.questions() == ["The other version"]
    assert one.page.locator(".branches .figures").inner_text() == "2/2"
    one.page.click("[aria-label='Earlier version']")
    assert one.questions() == ["The first version"]
    assert one.answers().last.locator(".body").inner_text() == first
    one.page.reload()
    assert one.questions() == ["The first version"]
    assert len(one.stored()[0]["nodes"]) == 4


def test_an_edit_is_not_disturbed_by_another_answer(visit):
    one = visit()
    one.say("One")
    one.page.click("#new-conversation")
    one.set(max_tokens=150)
    one.page.fill("#message", "Two")
    one.page.click("#send")
    one.page.click("#conversation-list .open >> text=One")
    one.page.locator(".user >> text=Edit").click()
    one.page.keyboard.type(" and a half")
    one.page.wait_for_function("() => !document.querySelector('#conversation-list [data-running]')")
    assert one.page.input_value(".editing textarea") == "One and a half"
    assert one.page.evaluate("document.activeElement.closest('.editing') !== null")
    one.page.keyboard.press("Escape")
    assert one.questions() == ["One"]


def test_retry_keeps_the_earlier_answer(visit):
    one = visit()
    one.say("Hello")
    one.page.click("text=Retry")
    one.page.wait_for_selector(".assistant .branches")
    assert one.page.locator(".assistant .branches .figures").inner_text() == "2/2"
    assert one.questions() == ["Hello"]


def test_rename_and_delete(visit):
    one = visit()
    one.say("Keep me")
    one.page.click("#new-conversation")
    one.say("Delete me")
    one.page.click("[aria-label='Rename “Delete me”']")
    one.page.fill("#new-title", "Going")
    one.page.press("#new-title", "Enter")
    one.page.click("[aria-label='Delete “Going”']")
    one.page.keyboard.press("Escape")
    assert len(one.stored()) == 2
    one.page.click("[aria-label='Delete “Going”']")
    with one.page.expect_request(lambda request: request.method == "DELETE") as request:
        one.page.click("#delete-confirm")
    one.page.wait_for_function("() => document.querySelectorAll('#conversation-list .open').length === 1")
    assert request.value.response().json()["deleted"] is True
    assert [kept["title"] for kept in one.stored()] == ["Keep me"]
    assert one.questions() == ["Keep me"]
