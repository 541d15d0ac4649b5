"""The memory beside the chat: chunks and their tiers, pins, the cluster, advice."""

from __future__ import annotations

import re

import pytest

from tests.web.conftest import LONG

pytestmark = [pytest.mark.timeout(180)]


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
    advised: list[str] = []
    one.page.on("request", lambda request: advised.append(request.url) if request.url.endswith("/advise") else None)
    with one.page.expect_response("**/advise") as response:
        one.page.reload()  # the box has focus then
        one.page.type("#message", "And so")
    assert response.value.status == 202
    assert len(advised) == 1
