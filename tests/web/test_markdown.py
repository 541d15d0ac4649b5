"""The page's markdown, in the browser: what it makes of a text, and that nothing in a text can act."""

from __future__ import annotations

import time

import pytest

pytestmark = [pytest.mark.timeout(120)]

RENDER = """async (text) => {
    const { render } = await import('/web/markdown.js');
    const box = document.createElement('div');
    box.append(render(text));
    return box.innerHTML;
}"""
LINK = 'target="_blank" rel="noopener noreferrer nofollow"'


@pytest.fixture(scope="module")
def page(chromium, served):
    opened = chromium.new_page()
    opened.goto(served.url)
    yield opened
    opened.close()


@pytest.fixture
def markdown(page):
    return lambda text: page.evaluate(RENDER, text)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("One\n\nTwo", "<p>One</p><p>Two</p>"),
        ("One\ntwo", "<p>One<br>two</p>"),
        ("# A\n### B ##", "<h3>A</h3><h5>B</h5>"),
        ("#no", "<p>#no</p>"),
        (
            "**b** *i* __b__ _i_ ~~d~~",
            "<p><strong>b</strong> <em>i</em> <strong>b</strong> <em>i</em> <del>d</del></p>",
        ),
        ("***x*** *a **b** c*", "<p><strong><em>x</em></strong> <em>a <strong>b</strong> c</em></p>"),
        ("**a *b***", "<p><strong>a <em>b</em></strong></p>"),
        ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
        ("**open", "<p>**open</p>"),
        ("`a*b*` ``c`d``", "<p><code>a*b*</code> <code>c`d</code></p>"),
        (r"\*no\* \<b>", "<p>*no* &lt;b&gt;</p>"),
        ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("- a\n  - b\n    - c\n- d", "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>"),
        ("1. a\n\n   more\n\n2. b", "<ol><li>a<p>more</p></li><li>b</li></ol>"),
        ("> a\n> b\n\nc", "<blockquote><p>a<br>b</p></blockquote><p>c</p>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("[a *b*](https://c.d/e_f)", f'<p><a href="https://c.d/e_f" {LINK}>a <em>b</em></a></p>'),
        ("See https://c.d/e_(f).", f'<p>See <a href="https://c.d/e_(f)" {LINK}>https://c.d/e_(f)</a>.</p>'),
        ("(https://c.d/e)", f'<p>(<a href="https://c.d/e" {LINK}>https://c.d/e</a>)</p>'),
        ("<https://c.d>", f'<p><a href="https://c.d/" {LINK}>https://c.d</a></p>'),
        ("![a](https://c.d/e.png)", f'<p><a href="https://c.d/e.png" {LINK}>a</a></p>'),
        ("", ""),
        ("\n\n  \n", ""),
    ],
)
def test_what_is_made_of_a_text(markdown, text, html):
    assert markdown(text) == html


def test_code_keeps_every_character(markdown):
    html = markdown("```py\nif a < b:\n    *c* # <b>\n\n```\nafter")
    assert "<code>if a &lt; b:\n    *c* # &lt;b&gt;\n</code>" in html
    assert ">py</span>" in html
    assert html.endswith("<p>after</p>")
    assert "<code>open" in markdown("~~~\nopen")  # still streaming


def test_tables(markdown):
    html = markdown("| a | b |\n|---|--:|\n| `c` | 1 |\n| d \\| e |\n\nafter")
    assert '<th data-align="right">b</th>' in html
    assert "<td><code>c</code></td>" in html
    assert "<td>d | e</td>" in html
    assert html.endswith("<p>after</p>")


ATTACKS = [
    "<script>window.attacked = 1</script>",
    "<img src=x onerror=window.attacked=1>",
    "<svg/onload=window.attacked=1>",
    "[a](javascript:window.attacked=1)",
    "[a](JaVaScRiPt:window.attacked=1)",
    "[a](java\tscript:window.attacked=1)",
    "[a](&#106;avascript:window.attacked=1)",
    "[a](data:text/html,<script>window.attacked=1</script>)",
    "[a](vbscript:x) [b](file:///etc/passwd) [c](//evil.example) [d](/v1/models)",
    "<javascript:window.attacked=1>",
    '[a](https://c.d/"onmouseover="window.attacked=1)',
    '![" onerror="window.attacked=1](https://c.d/x)',
    '```"><img src=x onerror=window.attacked=1>\ncode\n```',
    "`<img src=x onerror=window.attacked=1>`",
    "| <img src=x onerror=window.attacked=1> |\n|---|\n| <script>window.attacked=1</script> |",
    "# <iframe srcdoc='<script>parent.attacked=1</script>'>",
    "- <style>*{display:none}</style>",
    "> <form action=https://evil.example><button>go</button></form>",
    "<a href='javascript:window.attacked=1'>x</a>",
    "**<b onclick=window.attacked=1>x**",
]
LOOK = """async (text) => {
    const { render } = await import('/web/markdown.js');
    const box = document.createElement('div');
    box.append(render(text));
    document.body.append(box);
    for (const node of box.querySelectorAll('a, button')) node.dispatchEvent(new MouseEvent('mouseover'));
    await new Promise((resolve) => setTimeout(resolve, 20));
    const odd = [];
    for (const node of box.querySelectorAll('*')) {
        for (const { name, value } of node.attributes) {
            if (name.startsWith('on') || ['style', 'src', 'srcdoc'].includes(name)) odd.push(node.outerHTML);
            if (name === 'href' && !/^https?:\\/\\//.test(value)) odd.push(node.outerHTML);
        }
    }
    const acting = box.querySelectorAll('script, img, svg, iframe, style, form, input, object, embed, link, base');
    box.remove();
    return { odd, acting: acting.length, attacked: window.attacked ?? null };
}"""


@pytest.mark.parametrize("text", ATTACKS)
def test_texts_cannot_act(page, text):
    assert page.evaluate(LOOK, text) == {"odd": [], "acting": 0, "attacked": None}


def test_hostile_lengths_take_no_time(markdown):
    texts = [
        "*" * 50_000,
        "*a " * 20_000,
        "**a" * 20_000,
        "_a_b" * 10_000,
        "`" * 50_000,
        "[" * 50_000,
        "[a](" * 10_000,
        "# " + " " * 50_000 + "x",
        "> " * 20_000 + "x",
        "- " * 20_000,
        "http://" + "." * 50_000 + "a",
        "|" * 20_000 + "\n" + "|-" * 10_000,
        "```" + " " * 50_000 + "`",
        "\n" * 50_000,
    ]
    for text in texts:
        began = time.monotonic()
        markdown(text)
        assert time.monotonic() - began < 3, text[:10]


def test_a_growing_text_keeps_finished_blocks(page):
    result = page.evaluate("""async () => {
        const { Growing, render } = await import('/web/markdown.js');
        const text = ['# A', '', 'b *c* d', '', '```py', 'e', '', 'f', '```', '', '- g', '- h', '',
            '| i | j |', '|---|---|', '| k | l |', '', 'end'].join('\\n');
        const box = document.createElement('div');
        const growing = new Growing(box);
        const completed = [];
        let first = null;
        for (let end = 1; end <= text.length; end += 1) {
            completed.push(...growing.update(text.slice(0, end)));
            if (end === 10) first = box.firstChild;
        }
        const whole = document.createElement('div');
        whole.append(render(text));
        const same = box.innerHTML === whole.innerHTML;
        return { same, kept: first === box.firstChild, completed, last: growing.last };
    }""")
    assert result["same"]
    assert result["kept"]
    assert result["completed"][0] == "# A"
    assert len(result["completed"]) == 5
    assert result["last"] == "end"
