"""The page in a real browser, before a real server: chats, branches, failures, memory, keyboard and colours."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.serving.tenants import open_keyring
from tests.serving.server import Served
from tests.web.conftest import PHONE, Visit

pytestmark = [pytest.mark.timeout(180)]

LONG = "Tell me of the ships that came into the harbour, of their crews, and of what they carried. " * 4
STREAM = "**/v1/chat/completions"
IN_FLOW = "() => document.documentElement.scrollWidth <= innerWidth"


def streamed(*pieces: str, last: str = "data: [DONE]\n\n", **more: Any) -> dict[str, Any]:
    """A made-up answer, for what a real model would not say."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + last
    return {"status": 200, "content_type": "text/event-stream", "body": body, **more}


def expect_complaint(visit: Visit, words: str) -> None:
    """Browsers log every failed request: this one was wanted."""
    found = [complaint for complaint in visit.complaints if words in complaint]
    assert found, visit.complaints
    for complaint in found:
        visit.complaints.remove(complaint)


# --- chats ------------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_while_it_streams(visit):
    one = visit()
    one.set_max_tokens(60)
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
    one.page.click("#open-settings")
    one.page.fill("#system", "Be brief.")
    one.page.fill("#temperature", "0")
    one.page.fill("#max-tokens", "5")
    one.page.click("#settings button[value=ok]")
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
    one.set_max_tokens(200)
    one.page.fill("#message", "A long one")
    one.page.press("#message", "Enter")
    one.page.wait_for_selector("#stop", state="visible")
    one.page.click("#new-conversation")
    one.set_max_tokens(4)
    one.say("A short one")
    one.page.click("#conversation-list .open >> text=A long one")
    one.page.wait_for_selector(".assistant:not(.running)")
    one.page.wait_for_selector("#send", state="visible")
    assert len(one.stored()) == 2


def test_stop_keeps_what_has_come(visit, served):
    one = visit()
    one.set_max_tokens(3000)
    one.page.fill("#message", "Hello")
    one.page.click("#send")
    one.page.wait_for_function("() => document.querySelector('.running .body')?.textContent.length > 20")
    one.page.click("#stop")
    one.page.wait_for_selector("#send", state="visible")
    assert "Stopped here." in one.answers().last.inner_text()
    assert len(one.answers().last.locator(".body").inner_text()) > 20
    deadline = time.monotonic() + 20
    while served.cluster.scheduler_stats()["turns_running"]:
        assert time.monotonic() < deadline, "the server goes on"
        time.sleep(0.05)
    one.set_max_tokens(4)
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
    one.set_max_tokens(150)
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
    one.page.wait_for_selector("#ask-delete", state="hidden")
    assert request.value.response().json()["deleted"] is True
    assert [kept["title"] for kept in one.stored()] == ["Keep me"]
    assert one.questions() == ["Keep me"]


# --- what may go wrong ------------------------------------------------------------------------------------------------


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
    one.page.fill("#key", secret)
    one.page.press("#key", "Enter")
    one.page.wait_for_selector(".assistant:not(.running)")
    assert one.page.evaluate("sessionStorage.getItem('reprise.key')") == secret
    one.page.wait_for_selector("#strip button")
    assert one.page.locator("#cluster").is_hidden()
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


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_memory_shows_chunks_with_their_tiers(visit):
    one = visit()
    one.say(LONG)
    one.page.wait_for_selector("#strip button")
    cells = one.page.locator("#strip button")
    assert cells.count() >= 3
    label = cells.first.get_attribute("aria-label")
    assert re.fullmatch(r"Tokens 0 to 32, [\d.]+ KiB, in .*(HBM|DRAM).*", label)
    assert cells.first.inner_text().strip() in ("H", "D")
    cells.first.focus()
    one.page.keyboard.press("ArrowRight")
    assert one.page.locator("#strip-detail").inner_text().startswith("Tokens 32 to 64")
    one.page.keyboard.press("End")
    assert one.page.evaluate("document.activeElement === document.querySelector('#strip').lastElementChild")


def test_a_conversation_is_kept_and_let_go(visit):
    one = visit()
    one.say(LONG)
    one.page.click("#pin")
    one.page.wait_for_selector("#pin >> text=Kept until")
    one.page.click("#pin")
    one.page.wait_for_selector("#pin >> text=Keep for 10 minutes")
    one.page.click("#expire")
    one.page.wait_for_selector("#strip-status >> text=first to go")


def test_the_cluster_is_shown_live(visit):
    one = visit()
    one.page.wait_for_selector("#cluster", state="visible")
    tiers = one.page.locator("#tiers").inner_text()
    for name in ("HBM", "DRAM", "SSD"):
        assert name in tiers
    assert one.page.locator("#tiers progress").count() >= 3
    assert "turn" in one.page.locator("#replicas").inner_text()
    assert "Nobody waits." in one.page.locator("#waiting").inner_text()


def test_the_server_hears_that_the_user_is_about_to_speak(visit):
    one = visit()
    one.say(LONG)
    one.page.reload()
    advised: list[str] = []
    one.page.on("request", lambda request: advised.append(request.url) if request.url.endswith("/advise") else None)
    with one.page.expect_response("**/advise") as response:
        one.page.type("#message", "And so")
    assert response.value.status == 202
    assert len(advised) <= 1


# --- everybody --------------------------------------------------------------------------------------------------------


def test_a_phone_shows_everything_without_sideways_scrolling(visit):
    one = visit(**PHONE)
    one.say(LONG + "x" * 300)
    assert one.page.evaluate(IN_FLOW)
    assert one.page.locator("#memory-body").is_hidden()
    one.page.tap("#memory-toggle")
    one.page.wait_for_selector("#strip button")
    assert one.page.evaluate(IN_FLOW)
    one.page.tap("#memory-toggle")
    one.page.tap("#open-conversations")
    assert one.page.locator("#conversation-list .open").is_visible()
    assert one.page.evaluate(IN_FLOW)
    one.page.keyboard.press("Escape")
    assert one.page.locator("#conversations").is_hidden()


@pytest.mark.parametrize("options", [{}, {"viewport": {"width": 390, "height": 844}}], ids=["desktop", "phone"])
def test_everything_is_reached_by_keyboard(visit, options):
    one = visit(**options)
    one.say("Hello")
    one.page.wait_for_timeout(100)
    wanted = set(one.page.evaluate(FOCUSABLE))
    one.page.evaluate("document.activeElement.blur()")
    one.page.locator("body").press("Home")
    reached: set[str] = set()
    for _ in range(60):
        one.page.keyboard.press("Tab")
        name = one.page.evaluate("window.nameOf(document.activeElement)")
        if name in reached and wanted <= reached:
            break
        reached.add(name)
    assert wanted <= reached
    assert {"message", "open-settings"} <= wanted


FOCUSABLE = """() => {
    window.nameOf = (node) => node.id || node.getAttribute('aria-label') || node.textContent.trim();
    const all = document.querySelectorAll('button:not(:disabled):not([tabindex="-1"]), textarea, input, [tabindex="0"]');
    return [...all].filter((node) => node.checkVisibility()).map(window.nameOf);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(visit, scheme):
    one = visit(color_scheme=scheme)
    one.page.route(
        STREAM, lambda route: route.fulfill(**streamed("# A\n\n> b\n\n`c` [d](https://e.f)\n\n```py\ng\n```"))
    )
    one.page.fill("#message", "Hello")
    one.page.click("#send")
    one.page.wait_for_selector(".assistant:not(.running)")
    one.page.evaluate(
        "import('/web/strip.js').then(m => new m.Strip().update(['hbm', 'dram', 'ssd', 'object', null]"
        ".map((tier, i) => ({start: i, end: i + 1, bytes: 9, tiers: tier ? [tier] : []}))))"
    )
    one.page.evaluate("document.querySelector('#strip-view').hidden = false")
    found = one.page.evaluate(CONTRASTS)
    assert len(found) > 20
    assert [item for item in found if item["ratio"] < 4.5] == []


CONTRASTS = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b]
        .map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const color = channels(getComputedStyle(node).backgroundColor);
            if (color.length < 4 || color[3] > 0) return color;
        }
        return [255, 255, 255];
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('noscript')) continue;
        const [a, b] = [light(channels(getComputedStyle(node).color)), light(ground(node))];
        found.push({text: walker.currentNode.data, ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)});
    }
    return found;
}"""


def test_nothing_comes_from_elsewhere_and_every_control_has_a_name(visit, served):
    one = visit()
    hosts: set[str] = set()
    one.page.on("request", lambda request: hosts.add(request.url.split("/", 3)[2]))
    one.page.reload()
    one.say("Hello")
    assert hosts == {served.url.split("/", 3)[2]}
    unnamed = one.page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(node => !node.ariaLabel"
        " && !node.textContent.trim() && !(node.labels && node.labels.length)).map(node => node.outerHTML)"
    )
    assert unnamed == []
    policy = one.page.goto(served.url).headers["content-security-policy"]
    assert "default-src 'self'" in policy
