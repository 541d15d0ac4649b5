"""Reading conversations: both shapes, every kind of file, and every problem named with file and line."""

import gzip
import io
import json
from pathlib import Path

import fsspec
import pytest
import zstandard

from cluster import conversations
from cluster.conversations import Conversation, Exchange, InputError, Message, Problem, exchanges, read_conversations

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
DATA = Path(__file__).parents[3] / "shared" / "data" / "conversations"


def write(path, *records):
    """Records as JSONL; a str is a raw line, bytes as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def messages(*items, **fields):
    return {"messages": list(items), **fields}


def only_problem(path, *records):
    found = list(read_conversations(write(path, *records)))
    assert len(found) == 1
    assert isinstance(found[0], Problem)
    return found[0]


def test_openai_messages(tmp_path):
    parts = [{"type": "text", "text": "Hi "}, "there"]
    path = write(
        tmp_path / "a.jsonl",
        messages({"role": "developer", "content": "Be kind."}, HI, HELLO, id="x"),
        messages({"role": "user", "content": parts}, id=7),
    )
    first, second = read_conversations(path)
    assert first == Conversation(
        "x", (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello")), f"{path}:1"
    )
    assert second == Conversation("7", (Message("user", "Hi there"),), f"{path}:2")


def test_sharegpt(tmp_path):
    record = {
        "id": "s",
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": "{}"},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
    }
    (found,) = read_conversations(write(tmp_path / "a.jsonl", record))
    assert [m.role for m in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [m.content for m in found.messages] == ["Be brief.", "q", "{}", "r", "a"]


def test_a_call_without_text_is_its_json(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    (found,) = read_conversations(write(tmp_path / "a.jsonl", messages(HI, call, {"role": "tool", "content": "1"})))
    assert json.loads(found.messages[1].content) == call["tool_calls"]


def test_missing_ids_are_made_from_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", messages(HI), "", messages(HI, id=None))
    assert [c.id for c in read_conversations(path)] == ["a.jsonl:1", "a.jsonl:3"]


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)],
)
@pytest.mark.parametrize("place", ["file", "memory"])
def test_plain_and_compressed_anywhere(tmp_path, name, compress, place):
    url = str(tmp_path / name) if place == "file" else f"memory://{tmp_path.name}/{name}"
    with fsspec.open(url, "wb") as file:
        file.write(compress(b"\xef\xbb\xbf" + json.dumps(messages(HI, id="x")).encode() + b"\r\n"))
    assert [c.id for c in read_conversations(url)] == ["x"]


def test_several_zstd_frames_are_one_file(tmp_path):
    compressor = zstandard.ZstdCompressor()
    frames = [compressor.compress(json.dumps(messages(HI, id=i)).encode() + b"\n") for i in "abc"]
    (tmp_path / "a.zst").write_bytes(b"".join(frames))
    assert [c.id for c in read_conversations(str(tmp_path / "a.zst"))] == ["a", "b", "c"]


def test_jsonl_is_a_stream(monkeypatch):
    """The first conversation is there before the rest of the file was read."""
    read = []

    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            line = (json.dumps(messages(HI, id=len(read))) + "\n").encode()
            read.append(1)
            buffer[: len(line)] = line
            return len(line)

    class Opened:
        def __enter__(self):
            return io.BufferedReader(Endless())

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(conversations.fsspec, "open", lambda *_: Opened())
    assert [c.id for c in read_conversations("endless", limit=3)] == ["0", "1", "2"]
    assert len(read) < 10_000


def test_limit_counts_conversations_only(tmp_path):
    path = write(tmp_path / "a.jsonl", "oops", messages(HI), messages(), messages(HI), messages(HI))
    assert [type(found).__name__ for found in read_conversations(path, limit=2)] == [
        "Problem",
        "Conversation",
        "Problem",
        "Conversation",
    ]
    assert list(read_conversations(path, limit=0)) == []


# --- problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ('{"messages": [', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b'{"messages": "\xff"}', "not UTF-8 (byte 0xff at column 15)"),
        ('"text"', "a string instead of an object"),
        ({"text": "Hi"}, "no messages (keys: 'text')"),
        ({"messages": "Hi"}, '"messages" is a string'),
        (messages(), "the conversation is empty"),
        (messages("Hi"), "message 1 is a string"),
        (messages({"content": "Hi"}), 'message 1 has no "role"'),
        (messages(HI, {"role": "wizard", "content": "Hi"}), "message 2 has the unknown role 'wizard'"),
        (messages(HI, {"role": "assistant"}), 'message 2 has no "content"'),
        (messages({"role": "user", "content": 3}), "the content of message 1 is a number"),
        (messages({"role": "user", "content": [{"type": "image_url"}]}), "a part of type 'image_url'"),
        (messages({"role": "user", "content": [None]}), "a part of type 'null'"),
        (messages({"role": "system", "content": "x"}, HELLO), "no user message"),
        (messages(HELLO, HI), "an answer comes first"),
        (messages({"role": "tool", "content": "x"}, HI), "a tool result comes first"),
        (messages(HI, id=["x"]), '"id" is a list'),
        (messages(HI, id=True), '"id" is a boolean'),
    ],
)
def test_every_problem_is_named_and_the_rest_is_read(tmp_path, record, what):
    path = write(tmp_path / "a.jsonl", messages(HI, id="before"), "", record, messages(HI, id="after"))
    before, problem, after = read_conversations(path)
    assert (before.id, after.id) == ("before", "after")
    assert problem.where == f"{path}:3"
    assert what in problem.what
    assert problem.advice
    assert str(problem) == f"{path}:3: {problem.what} ({problem.advice})"


def test_a_second_use_of_an_id_is_a_problem(tmp_path):
    path = write(tmp_path / "a.jsonl", messages(HI, id="x"), messages(HI, id="y"), messages(HI, id="x"))
    found = list(read_conversations(path))
    assert [f.id for f in found[:2]] == ["x", "y"]
    assert f"'x' was already used at {path}:1" in found[2].what


def test_files_that_cannot_be_read_raise_at_once(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist.*check the path"):
        read_conversations(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match="folder"):
        read_conversations(str(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        read_conversations("no-such-protocol://bucket/file")
    for text in ("", " \n\n\t\n"):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(InputError, match="is empty: write one conversation per line"):
            read_conversations(str(tmp_path / "empty.jsonl"))
    for name in ("a.gz", "a.zst"):
        (tmp_path / name).write_bytes(b"not compressed at all")
        with pytest.raises(InputError, match="damaged"):
            read_conversations(str(tmp_path / name))


def test_damage_in_the_middle_raises_where_it_is(tmp_path):
    whole = gzip.compress(b"".join(json.dumps(messages(HI, id=str(i * 7919))).encode() + b"\n" for i in range(5000)))
    (tmp_path / "a.gz").write_bytes(whole[: len(whole) // 2])
    found = []
    with pytest.raises(InputError, match=r"a\.gz:\d+: compressed data is damaged"):
        found.extend(read_conversations(str(tmp_path / "a.gz")))


# --- JSON lists -------------------------------------------------------------------------------------------------------


def test_a_json_list_pretty_or_not(tmp_path):
    items = [messages(HI, id="a"), messages(HI, HELLO), messages(HELLO, HI)]
    for indent, lines in ((None, (1, 1, 1)), (2, (2, 11, 23))):
        (tmp_path / "a.json").write_text(json.dumps(items, indent=indent))
        first, second, third = read_conversations(str(tmp_path / "a.json"))
        assert first.id == "a"
        assert isinstance(second, Conversation)
        assert third.what == "an answer comes first"
        assert [found.where for found in (first, second, third)] == [f"{tmp_path}/a.json:{n}" for n in lines]


def test_blank_lines_before_a_list_are_counted(tmp_path):
    (tmp_path / "a.json").write_text("\n\n  [\n\n" + json.dumps(messages(HI)) + "\n]\n")
    (found,) = read_conversations(str(tmp_path / "a.json"))
    assert found.where.endswith("a.json:5")


@pytest.mark.parametrize(
    ("text", "num_read", "line", "what"),
    [
        ('[{"messages": []}\n{"messages": []}]', 0, 1, "item 1 of the list is not JSON: no , or ] after it"),
        ('[\n{"id": 1},\n{"id" 2}\n]', 1, 3, "item 2 of the list is not JSON"),
        ('[\n{"id": 1},\n{"id": 2}', 1, 3, "item 2 of the list is not JSON: no , or ]"),
        ("[", 0, 1, "item 1 of the list is not JSON"),
    ],
)
def test_a_broken_list_names_item_and_line(tmp_path, text, num_read, line, what):
    (tmp_path / "a.json").write_text(text)
    *read, last = read_conversations(str(tmp_path / "a.json"))
    assert len(read) == num_read
    assert last.where.endswith(f"a.json:{line}")
    assert what in last.what
    assert "nothing after it was read" in last.advice


def test_a_list_that_is_not_utf8(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[\n{"messages":\n"\xe9"}]')
    (problem,) = read_conversations(str(tmp_path / "a.json"))
    assert problem.where.endswith("a.json:3")
    assert "UTF-8" in problem.what


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("su", [("su", None)]),
        ("ua", [("u", "a2")]),
        ("uaua", [("u", "a2"), ("u", "a4")]),
        ("uu", [("u", None), ("u", None)]),
        ("suua", [("su", None), ("u", "a4")]),
        ("uaau", [("u", "a2\n\na3"), ("u", None)]),
        ("uata", [("u", "a2"), ("t", "a4")]),
        ("uat", [("u", "a2"), ("t", None)]),
        ("uattua", [("u", "a2"), ("ttu", "a6")]),
        ("usu", [("u", None), ("su", None)]),
        ("utu", [("ut", None), ("u", None)]),
    ],
)
def test_turns(roles, expected):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    parts = tuple(Message(names[r], f"{r}{i}") for i, r in enumerate(roles, start=1))
    found = exchanges(Conversation("x", parts, "f:1"))
    assert all(isinstance(exchange, Exchange) for exchange in found)
    assert [("".join(m.role[0] for m in e.messages), e.recorded) for e in found] == expected
    assert [m for e in found for m in e.messages] == [m for m in parts if m.role != "assistant"]


@pytest.mark.skipif(not DATA.is_dir(), reason="the real conversations are not here")
@pytest.mark.parametrize(
    ("name", "num_conversations", "num_turns"),
    [
        ("crosswoz_val_test", 1000, 8467),
        ("mt_bench", 80, 160),
        ("mt_bench_101", 1388, 4208),
        ("tau_bench_airline", 200, 2654),
    ],
)
def test_real_conversations(name, num_conversations, num_turns):
    found = list(read_conversations(str(DATA / f"{name}.jsonl.zst")))
    assert [f for f in found if isinstance(f, Problem)] == []
    assert len(found) == num_conversations
    assert sum(len(exchanges(conversation)) for conversation in found) == num_turns
