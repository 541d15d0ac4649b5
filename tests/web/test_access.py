"""The page for everybody: phones, keyboards, colours, names of controls, nothing from elsewhere."""

from __future__ import annotations

import pytest

from tests.web.conftest import LONG, PHONE, STREAM, streamed

IN_FLOW = "() => document.documentElement.scrollWidth <= innerWidth"

pytestmark = [pytest.mark.timeout(180)]


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
    const controls = 'button:not(:disabled):not([tabindex="-1"]), textarea, input, [tabindex="0"]';
    const all = document.querySelectorAll(controls);
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
