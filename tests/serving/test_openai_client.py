"""The real `openai` client against the real server: what works with vLLM and SGLang works here, unchanged."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import openai
import pytest

from tests.serving.server import Served
from tests.serving.test_door import wait_until

pytestmark = [pytest.mark.timeout(120)]

SYSTEM = {"role": "system", "content": "You are a careful guide through a city that nobody knows. " * 3}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="anything", max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (card,) = client.models.list().data
    return str(card.id)


def ask(*words: str) -> list[Any]:
    roles = ("user", "assistant")
    return [SYSTEM, *({"role": roles[i % 2], "content": text} for i, text in enumerate(words))]


def test_models(client, model):
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("another")


def test_an_answer_and_its_usage(client, model):
    answer = client.chat.completions.create(model=model, messages=ask("Where to first?"), max_tokens=9, temperature=0)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    usage = answer.usage
    assert usage.completion_tokens == 9
    assert usage.total_tokens == usage.prompt_tokens + 9
    assert usage.prompt_tokens_details.cached_tokens == 0
    told = usage.model_extra["reprise"]
    assert sum(told["reused"].values()) + sum(told["recomputed"].values()) == usage.prompt_tokens


def test_the_second_turn_reuses_the_first_token_for_token(client, model):
    words = ["How far is the harbour from the old gate?"]
    first = client.chat.completions.create(model=model, messages=ask(*words), max_tokens=12, temperature=0.9, seed=1)
    words += [first.choices[0].message.content, "And on foot?"]
    raw = client.chat.completions.with_raw_response.create(model=model, messages=ask(*words), max_tokens=8)
    second = raw.parse()
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1  # the last token's KV was never computed
    assert second.usage.prompt_tokens_details.cached_tokens == known
    told = second.usage.model_extra["reprise"]
    assert told["drift_at"] is None
    assert told["session_id"] == first.usage.model_extra["reprise"]["session_id"] == raw.headers["x-reprise-session"]
    assert raw.headers["x-reprise-reused"] == f"hbm={known}"
    assert "never_stored" in raw.headers["x-reprise-recomputed"]


def test_a_stream_has_the_same_words(client, model):
    asked = {"model": model, "messages": ask("Tell me of the river."), "max_tokens": 16, "temperature": 0.8, "seed": 5}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 16
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_nothing_is_streamed_before_the_first_token(served, model):
    body = {"messages": ask("Tell me of the river. " * 60), "max_tokens": 2, "stream": True}
    arrivals = []
    began = time.perf_counter()
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            arrivals += [(time.perf_counter(), line)] if line.startswith("data: {") else []
    role, first = arrivals[0], arrivals[1]
    assert '"role"' in role[1]
    assert '"role"' not in first[1]
    assert first[0] - role[0] < 0.3 * (first[0] - began)  # clients take the first chunk's time for the first token's


def test_usage_comes_only_when_asked_for(client, model):
    chunks = list(client.chat.completions.create(model=model, messages=ask("Hm?"), max_tokens=3, stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_choices_differ_and_are_repeatable(client, model):
    asked = {"model": model, "messages": ask("Choose."), "max_tokens": 12, "temperature": 1.5, "seed": 3, "n": 3}
    one, two = client.chat.completions.create(**asked), client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in one.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in two.choices]
    assert one.usage.completion_tokens == 36
    single = client.chat.completions.create(**{**asked, "n": 1})
    assert one.usage.prompt_tokens == single.usage.prompt_tokens
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[i] for i in range(3)] == texts


def test_a_stop_string_ends_an_answer_and_the_next_turn_goes_on_from_what_was_kept(client, model):
    asked = {"model": model, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(messages=ask("Stop somewhere."), **asked).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = client.chat.completions.create(messages=ask("Stop somewhere."), stop=[stop], **asked)
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    words = ["Stop somewhere.", cut.choices[0].message.content, "Go on."]
    after = client.chat.completions.create(messages=ask(*words), **asked)
    assert after.usage.prompt_tokens_details.cached_tokens >= cut.usage.prompt_tokens
    assert after.usage.model_extra["reprise"]["drift_at"] is None


def test_after_a_stop_button_the_next_turn_goes_on_from_what_was_shown(served, client, model):
    words = ["Tell me of the harbour, at length."]
    asked: dict[str, Any] = {"model": model, "temperature": 0.9, "seed": 11}
    shown, session = "", ""
    with client.chat.completions.create(
        messages=ask(*words), stream=True, max_tokens=2000, extra_body={"ignore_eos": True}, **asked
    ) as stream:
        session = stream.response.headers["x-reprise-session"]
        for chunk in stream:
            shown += chunk.choices[0].delta.content or ""
            if len(shown) > 150:
                break
    wait_until(lambda: served.service.num_running == 0)
    served.run(served.service.settle())
    words += [shown, "Shorter, please."]
    second = client.chat.completions.with_raw_response.create(messages=ask(*words), max_tokens=8, **asked)
    assert second.headers["x-reprise-session"] == session
    assert "x-reprise-drift" not in second.headers
    usage = second.parse().usage
    found = usage.prompt_tokens_details.cached_tokens + usage.model_extra["reprise"]["recomputed"].get(
        "computed_sooner", 0
    )
    num_new = len(served.tokenizer.encode("Shorter, please.")) + 12  # and what the template has around it
    chunk_tokens = served.cluster.config.model.chunk_tokens  # the last one goes on beyond what was shown
    assert found > usage.prompt_tokens - num_new - chunk_tokens


def test_penalties_and_biases_change_the_answer(client, model):
    asked = {"model": model, "messages": ask("Say it again and again."), "max_tokens": 24, "temperature": 0}
    plain = client.chat.completions.create(**asked, logprobs=True)
    first = plain.choices[0].logprobs.content[0]
    varied = client.chat.completions.create(**asked, frequency_penalty=2.0, presence_penalty=2.0)
    assert varied.choices[0].message.content != plain.choices[0].message.content
    biased = client.completions.create(model=model, prompt="x", max_tokens=3, temperature=0, logit_bias={"300": 100})
    repeated = client.completions.create(model=model, prompt="x", max_tokens=1, temperature=0, logit_bias={"300": 100})
    assert biased.choices[0].text == repeated.choices[0].text * 3
    assert first.logprob <= 0


def test_logprobs_of_chats(client, model):
    answer = client.chat.completions.create(
        model=model, messages=ask("Likely?"), max_tokens=5, logprobs=True, top_logprobs=3, temperature=0
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert bytes(entry.bytes).decode() == entry.token


def test_completions_go_on_from_their_own_tokens(client, model):
    prompt = "Once upon a time there was a lighthouse " * 4
    first = client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0.9, seed=2)
    longer = prompt + first.choices[0].text + " and then"
    second = client.completions.create(model=model, prompt=longer, max_tokens=4)
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == known


def test_completions_of_ids_several_prompts_and_columns_of_logprobs(client, model):
    answer = client.completions.create(model=model, prompt=["One", "Two"], n=2, max_tokens=4, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    columns = answer.choices[0].logprobs
    assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.top_logprobs) == 4
    assert columns.text_offset[0] == 0
    ids = client.completions.create(model=model, prompt=[5, 6, 7, 8], max_tokens=2)
    assert ids.usage.prompt_tokens == 4
    streamed = list(client.completions.create(model=model, prompt=[[5, 6], [7, 8]], max_tokens=2, stream=True))
    assert {choice.index for chunk in streamed for choice in chunk.choices} == {0, 1}


def test_content_parts_other_roles_and_unknown_fields(client, model):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    one = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=3, extra_body={"mystery": 1, "ignore_eos": True}
    )
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    two = client.chat.completions.create(model=model, messages=plain, max_tokens=3)
    assert one.usage.prompt_tokens == two.usage.prompt_tokens
    assert one.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format 'json_object' is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools are not supported"),
        ({"presence_penalty": 2.5}, "presence_penalty: .*less than or equal to 2"),
        ({"logit_bias": {"five": 1}}, "logit_bias.*pattern"),
        ({"temperature": -1}, "temperature: .*greater than or equal to 0"),
        ({"top_logprobs": 2}, "needs logprobs=true"),
        ({"extra_body": {"min_tokens": 9}}, "min_tokens .9. is above"),
        ({"n": 0}, "n: .*greater than or equal to 1"),
        ({"messages": []}, "messages: .*at least 1"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "only text parts"),
        ({"messages": [{"role": "user", "content": None}]}, "has no content"),
        ({"messages": [{"role": "user", "content": "long " * 9000}]}, "at most .* leave room"),
    ],
)
def test_what_cannot_be_done_is_said(client, model, fields, words):
    asked: dict[str, Any] = {"model": model, "messages": ask("Hi"), "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(**(asked | fields))
    assert caught.value.body["type"] == "invalid_request_error"


def test_an_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError, match="not served here") as caught:
        client.chat.completions.create(model="gpt-9", messages=ask("Hi"))
    assert caught.value.code == "model_not_found"


def test_many_at_once_with_the_async_client(served, model):
    async def converse(client: openai.AsyncOpenAI, i: int) -> list[int]:
        words, cached = [f"Traveller {i} asks about the bridge number {i}."], []
        for turn in range(3):
            stream = await client.chat.completions.create(
                model=model,
                messages=ask(*words),
                max_tokens=8,
                temperature=0.7,
                stream=True,
                stream_options={"include_usage": True},
            )
            text = ""
            async for chunk in stream:
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                if chunk.usage:
                    cached.append(chunk.usage.prompt_tokens_details.cached_tokens)
            words += [text, f"And {turn}?"]
        return cached

    async def all_of_them() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(converse(client, i) for i in range(12)))

    for first, second, third in asyncio.run(all_of_them()):
        assert first < second < third


def test_the_body_must_be_json_and_errors_are_openais(served):
    for path in ("/v1/chat/completions", "/v1/completions"):
        reply = httpx.post(served.url + path, content=b"{nonsense", headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{served.url}/v1/chat/completions").status_code == 405
    head = httpx.head(f"{served.url}/metrics")
    assert (head.status_code, head.content) == (200, b"")
    assert httpx.head(f"{served.url}/v1/completions").status_code == 405
    assert httpx.get(f"{served.url}/version").json()["version"]
    assert httpx.get(f"{served.url}/nowhere").json()["error"]["type"] == "not_found_error"
