"""A real server with the page, and Chromium to look at it. Skipped where there is no Chromium or no playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.serving.server import Served, served_from, serving_config

ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
STREAM = "**/v1/chat/completions"
LONG = "Tell me of the ships that came into the harbour, of their crews, and of what they carried. " * 4


@pytest.fixture(scope="package")
def served(
    chromium: Any, local_ray: None, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server with one replica, DRAM and SSD, open to everybody."""
    with served_from(serving_config(small_model, tmp_path_factory.mktemp("page"))) as server:
        yield server


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    """A running browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A person's window on the page: what they do with it, and what it complained of."""

    page: Any
    url: str
    complaints: list[str] = field(default_factory=list)

    def hear(self, line: Any) -> None:
        """Errors and warnings of the console. A turn may not be noted yet just after it: a 404, and asked again."""
        is_early = "404" in line.text and "/reprise/v1/conversations/" in line.location.get("url", "")
        if line.type in ("error", "warning") and not is_early:
            self.complaints.append(line.text)

    def say(self, text: str) -> str:
        """Sends a message; the answer when it is complete."""
        self.page.fill("#message", text)
        before = self.answers().count()
        self.page.click("#send")
        self.page.wait_for_function("n => document.querySelectorAll('.assistant:not(.running)').length > n", arg=before)
        return self.answers().last.locator(".body").inner_text()

    def answers(self) -> Any:
        return self.page.locator(".message.assistant:not(.running)")

    def questions(self) -> list[str]:
        texts: list[str] = self.page.locator(".message.user .body").all_inner_texts()
        return texts

    def set(self, **values: object) -> None:
        """Fills the settings' fields and returns when they are stored."""
        self.page.click("#open-settings")
        for name, value in values.items():
            self.page.fill(f"#{name.replace('_', '-')}", str(value))
        self.page.evaluate("localStorage.removeItem('reprise.settings')")
        self.page.click("#settings button[value=ok]")
        self.page.wait_for_function("() => localStorage.getItem('reprise.settings') !== null")

    def stored(self) -> list[dict[str, Any]]:
        """The conversations as the browser keeps them."""
        found: list[dict[str, Any]] = self.page.evaluate(
            "Object.keys(localStorage).filter(key => key.startsWith('reprise.conversation.'))"
            ".map(key => JSON.parse(localStorage[key]))"
        )
        return found


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


@pytest.fixture
def visit(chromium: Any, served: Served) -> Iterator[Any]:
    """Opens windows, each with a storage of its own; at the end none of them may have complained."""
    contexts, visits = [], []

    def open_page(**options: Any) -> Visit:
        context = chromium.new_context(**(DESKTOP | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        one = Visit(page, served.url)
        page.on("pageerror", lambda error: one.complaints.append(f"error: {error}"))
        page.on("console", one.hear)
        page.goto(served.url)
        visits.append(one)
        return one

    yield open_page
    for context in contexts:
        context.close()
    assert [complaint for one in visits for complaint in one.complaints] == []
