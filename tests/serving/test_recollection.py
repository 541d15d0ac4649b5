"""Conversations are recognised by their messages: token for token, branch by branch, tenant by tenant."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.engine.tokenizer import load_tokenizer
from cluster.chat import ChatFormat
from cluster.conversations import Message
from cluster.serving.recollection import BLOCK_CHARS, Recalled, Recollection
from storage.histories import Histories, Record

SCOPE, OTHER = "aa" * 32, "bb" * 32


class LocalShelf:
    """The real records, without the actor around them."""

    def __init__(self) -> None:
        self.histories = Histories(None, 1 << 24)
        self.num_asked = 0

    async def get(self, keys: list[str], limit: int | None = None) -> list[Record]:
        self.num_asked += 1
        return self.histories.get(keys, limit)

    async def put(self, records: list[Record], since: float) -> None:
        self.histories.put(records, since)


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return load_tokenizer(str(small_model))


@pytest.fixture
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat(tokenizer)


@pytest.fixture
def shelf() -> LocalShelf:
    return LocalShelf()


@pytest.fixture
def recollection(chat: ChatFormat, shelf: LocalShelf) -> Recollection:
    return Recollection(chat, shelf)


def say(*words: str) -> list[Message]:
    """user, assistant, user, ..."""
    return [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(words)]


def strange(chat: ChatFormat, text: str) -> tuple[int, ...]:
    """Ids of this text that the tokenizer itself would not choose: a token a character; and an end token."""
    ids = [token_id for character in text for token_id in chat.tokenize_after(character)]
    return (*ids, chat.tokenizer.eos_token_id)


def recall(
    recollection: Recollection, messages: list[Message], scope: str = SCOPE, session: str | None = None
) -> Recalled:
    return asyncio.run(recollection.recall(scope, messages, session))


def answer(recollection: Recollection, recalled: Recalled, text: str) -> tuple[int, ...]:
    ids = strange(recollection.chat, text)
    asyncio.run(recollection.remember(recalled, ids, text))
    return ids


def goes_on(second: Recalled, first: Recalled, ids: tuple[int, ...]) -> bool:
    known = first.prompt.token_ids + ids
    return second.prompt.token_ids[: len(known)] == known


def test_the_history_is_what_the_model_said_token_for_token(recollection):
    first = recall(recollection, say("Hi there"))
    ids = answer(recollection, first, "good day to you")
    assert ids[:-1] != recollection.chat.tokenize_after("good day to you")  # it would be spelt otherwise anew
    second = recall(recollection, say("Hi there", "good day to you", "Who are you?"))
    assert second.is_known
    assert second.session_id == first.session_id
    assert goes_on(second, first, ids)
    assert second.prompt.drift_at is None


def test_another_process_finds_it_on_the_shelf(recollection, chat, shelf):
    first = recall(recollection, say("Hi"))
    ids = answer(recollection, first, "alpha")
    second = recall(recollection, say("Hi", "alpha", "So?"))
    more = answer(recollection, second, "beta")
    elsewhere = Recollection(chat, shelf)
    third = recall(elsewhere, say("Hi", "alpha", "So?", "beta", "And?"))
    assert third.session_id == first.session_id
    assert goes_on(third, second, more)
    assert goes_on(third, first, ids)
    assert third.prompt == recall(recollection, say("Hi", "alpha", "So?", "beta", "And?")).prompt


def test_a_known_history_is_not_looked_for(recollection, shelf):
    first = recall(recollection, say("Hi"))
    answer(recollection, first, "alpha")
    asked = shelf.num_asked
    recall(recollection, say("Hi", "alpha", "So?"))
    assert shelf.num_asked == asked


@pytest.mark.parametrize("sent", [" alpha \n", "alpha", "\nalpha"])
def test_whitespace_around_an_answer_does_not_matter(recollection, sent):
    first = recall(recollection, say("Hi"))
    ids = answer(recollection, first, " alpha \n")
    assert goes_on(recall(recollection, say("Hi", sent, "So?")), first, ids)


def test_branches_go_their_own_ways_from_what_they_share(recollection):
    first = recall(recollection, say("Hi"))
    ids = answer(recollection, first, "alpha")
    left = recall(recollection, say("Hi", "alpha", "Left?"))
    left_ids = answer(recollection, left, "beta")
    right = recall(recollection, say("Hi", "alpha", "Right?"))
    right_ids = answer(recollection, right, "gamma")
    assert goes_on(left, first, ids)
    assert goes_on(right, first, ids)
    assert goes_on(recall(recollection, say("Hi", "alpha", "Left?", "beta", "x")), left, left_ids)
    assert goes_on(recall(recollection, say("Hi", "alpha", "Right?", "gamma", "x")), right, right_ids)


def test_two_answers_to_one_question_are_both_known(recollection):
    one, two = recall(recollection, say("Hi")), recall(recollection, say("Hi"))
    one_ids, two_ids = answer(recollection, one, "alpha"), answer(recollection, two, "beta")
    assert goes_on(recall(recollection, say("Hi", "alpha", "?")), one, one_ids)
    assert goes_on(recall(recollection, say("Hi", "beta", "?")), two, two_ids)


def stop(recollection: Recollection, recalled: Recalled, text: str) -> tuple[int, ...]:
    ids = strange(recollection.chat, text)[:-1]
    asyncio.run(recollection.remember_stopped(recalled, ids, text))
    return ids


@pytest.mark.parametrize("num_received", [1, 7, 12, 16])
def test_a_stopped_answer_goes_on_from_what_its_client_received(recollection, chat, shelf, num_received):
    first = recall(recollection, say("Hi"))
    text = "good day to you"
    ids = stop(recollection, first, " " + text)
    received = text[:num_received]
    second = recall(Recollection(chat, shelf), say("Hi", received, "Who are you?"))
    assert second.is_known
    assert second.session_id == first.session_id
    assert goes_on(second, first, ids[: 1 + len(received.rstrip())])
    assert second.prompt.drift_at is None
    more = answer(recollection, second, "alpha")
    third = recall(Recollection(chat, shelf), say("Hi", received, "Who are you?", "alpha", "So?"))
    assert goes_on(third, second, more)
    assert third.session_id == first.session_id


def test_a_stopped_answer_that_the_client_has_changed_is_an_edit(recollection):
    first = recall(recollection, say("Hi"))
    stop(recollection, first, "good day to you")
    assert not recall(recollection, say("Hi", "good night", "So?")).is_known
    assert not recall(recollection, say("Hi", "", "So?")).is_known
    assert not recall(recollection, say("Hello", "good", "So?")).is_known
    assert not recall(recollection, say("Hi", "good", "So?"), scope=OTHER).is_known


def test_of_two_that_were_stopped_each_is_known(recollection):
    first = recall(recollection, say("Hi"))
    ids = [stop(recollection, first, text) for text in ("good day to you", "hello")]
    assert goes_on(recall(recollection, say("Hi", "good day", "So?")), first, ids[0][:8])
    assert goes_on(recall(recollection, say("Hi", "hell", "So?")), first, ids[1][:4])
    whole = answer(recollection, first, "hello there")
    assert goes_on(recall(recollection, say("Hi", "hello there", "So?")), first, whole)


@pytest.mark.parametrize("received", ["x🙂", "x🙂y", "x"])
def test_a_character_of_several_tokens_is_whole_or_missing(recollection, received):
    first = recall(recollection, say("Hi"))
    ids = (*strange(recollection.chat, "x🙂y")[:-1], recollection.chat.tokenize_after("🙂")[0])
    asyncio.run(recollection.remember_stopped(first, ids, "x🙂y"))
    second = recall(recollection, say("Hi", received, "So?"))
    assert goes_on(second, first, strange(recollection.chat, received)[:-1])


def test_what_was_deleted_meanwhile_is_not_remembered(recollection, shelf):
    first, second = recall(recollection, say("Hi"), session="mine"), recall(recollection, say("Ho"), session="mine")
    recollection.forget(SCOPE, "mine")
    shelf.histories.delete(f"{SCOPE}/mine")
    answer(recollection, first, "alpha")
    stop(recollection, second, "beta gamma")
    assert len(shelf.histories) == 0
    assert not recall(recollection, say("Hi", "alpha", "?")).is_known
    assert not recall(recollection, say("Ho", "beta", "?")).is_known


def test_an_edited_history_keeps_what_comes_before_the_edit(recollection):
    first = recall(recollection, say("Hi"))
    ids = answer(recollection, first, "alpha")
    second = recall(recollection, say("Hi", "alpha", "So?"))
    answer(recollection, second, "beta")
    edited = recall(recollection, say("Hi", "alpha", "So??", "something else", "And?"))
    assert goes_on(edited, first, ids)
    changed = recall(recollection, say("Hello", "alpha", "So?"))
    assert not changed.is_known


def test_a_history_from_elsewhere_is_spelt_once_and_then_the_same(recollection, chat, shelf):
    imported = say("Hi", "I am another model", "So?")
    first = recall(recollection, imported)
    assert not first.is_known
    ids = answer(recollection, first, "beta")
    longer = [*imported, *say("", "beta", "And?")[1:]]
    second = recall(Recollection(chat, shelf), longer)
    assert second.is_known
    assert goes_on(second, first, ids)


def test_a_history_whose_beginning_was_forgotten_is_spelt_anew_from_there(recollection, chat, shelf):
    first = recall(recollection, say("Hi"))
    answer(recollection, first, "alpha")
    second = recall(recollection, say("Hi", "alpha", "So?"))
    ids = answer(recollection, second, "beta")
    shelf.histories._db.execute("DELETE FROM records WHERE number = 1")  # the oldest leave first
    third = recall(Recollection(chat, shelf), say("Hi", "alpha", "So?", "beta", "And?"))
    tokens = third.prompt.token_ids
    at = third.prompt.cuts[2]  # of prompts and answers: the second prompt's end
    assert tokens[at : at + len(ids)] == ids
    assert tokens[: len(first.prompt.token_ids)] == first.prompt.token_ids
    assert third.prompt.drift_at is None
    assert third.session_id == first.session_id


def test_tenants_do_not_know_each_others_words(recollection):
    first = recall(recollection, say("Hi"))
    answer(recollection, first, "alpha")
    theirs = recall(recollection, say("Hi", "alpha", "So?"), scope=OTHER)
    assert not theirs.is_known
    assert theirs.session_id != first.session_id
    text = asyncio.run(recollection.recall_text(SCOPE, "Once upon", None))
    answer(recollection, text, " a time")
    assert not asyncio.run(recollection.recall_text(OTHER, "Once upon a time there", None)).is_known


def test_a_session_id_is_taken_as_given(recollection):
    first = recall(recollection, say("Hi"), session="mine")
    assert first.session_id == "mine"
    answer(recollection, first, "alpha")
    assert recall(recollection, say("Hi", "alpha", "?")).session_id == "mine"
    assert recall(recollection, say("Hi", "alpha", "?"), session="other").session_id == "other"


def test_a_deleted_session_is_not_known_any_more(recollection, shelf):
    first = recall(recollection, say("Hi"), session="mine")
    answer(recollection, first, "alpha")
    recollection.forget(SCOPE, "mine")
    assert shelf.histories.delete(f"{SCOPE}/mine") == 1
    assert not recall(recollection, say("Hi", "alpha", "?")).is_known


@pytest.mark.parametrize("length", [3, BLOCK_CHARS - 5, 3 * BLOCK_CHARS + 7])
def test_a_text_goes_on_from_the_longest_that_is_known(recollection, chat, shelf, length):
    start = ("once upon a time " * 200)[:length]
    first = asyncio.run(recollection.recall_text(SCOPE, start, None))
    ids = strange(chat, "there was")[:-1]
    asyncio.run(recollection.remember(first, ids, "there was"))
    second = asyncio.run(Recollection(chat, shelf).recall_text(SCOPE, start + "there was a king", None))
    known = first.prompt.token_ids + ids
    assert second.prompt.token_ids[: len(known)] == known
    assert second.prompt.cuts == (len(known),)
    assert second.session_id == first.session_id
    asyncio.run(recollection.remember(second, strange(chat, " who")[:-1], " who"))
    third = asyncio.run(recollection.recall_text(SCOPE, start + "there was a king who sang", None))
    assert third.prompt.token_ids[: len(second.prompt.token_ids)] == second.prompt.token_ids
    other = asyncio.run(recollection.recall_text(SCOPE, start + "there is a king", None))
    assert not other.is_known


@pytest.mark.parametrize("between", ["", " ", "\n", "  \n "])
@pytest.mark.parametrize("answer_text", ["there was", " there was ", "there was\n\n"])
def test_whitespace_around_a_completion_does_not_matter(recollection, between, answer_text):
    first = asyncio.run(recollection.recall_text(SCOPE, "USER: hello ASSISTANT:", None))
    ids = strange(recollection.chat, answer_text)[:-1]
    asyncio.run(recollection.remember(first, ids, answer_text))
    text = f"USER: hello ASSISTANT:{between}{answer_text.lstrip() if between else answer_text}USER: go on ASSISTANT:"
    second = asyncio.run(recollection.recall_text(SCOPE, text, None))
    known = first.prompt.token_ids + ids
    assert second.prompt.token_ids == known + recollection.chat.tokenize_after("USER: go on ASSISTANT:")


def test_a_short_prompt_shared_by_many_finds_its_own_answer(recollection):
    for i in range(40):
        first = asyncio.run(recollection.recall_text(SCOPE, "Go:", f"s{i}"))
        asyncio.run(recollection.remember(first, strange(recollection.chat, f"answer {i}!")[:-1], f"answer {i}!"))
    found = asyncio.run(recollection.recall_text(SCOPE, "Go:answer 17! And?", None))
    assert found.session_id == "s17"


def test_words_of_any_kind(recollection):
    for text in ("\x00", "🙂" * 300, "a\r\nb"):
        first = recall(recollection, say(text))
        asyncio.run(recollection.remember(first, (5, 6), text))
        assert recall(recollection, say(text, text, "?")).is_known
