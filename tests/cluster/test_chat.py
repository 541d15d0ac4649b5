"""A session's history keeps its tokens under templates of every style, and drift is reported where it begins."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from cluster.chat import ChatFormat, TemplateError, Transcript
from cluster.conversations import Message
from cluster.tiny_model import train_tokenizer

torch.set_num_threads(1)

LLAMA3 = """{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif -%}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor -%}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
CHATML = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{%- elif message['role'] == 'assistant' %} {{ message['content'] | trim }}{{ eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
QWEN3 = """{% for message in messages -%}
{% set content = message['content'] -%}
{% if message['role'] == 'assistant' and '</think>' in content and not loop.last -%}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif -%}
<|im_start|>{{ message['role'] }}
{{ content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SHOUTING = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] | upper }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FORGETFUL = """{% for message in messages %}{% if message['role'] != 'assistant' %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LAST_FOUR = """{% for message in messages[-4:] %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
MARKERS += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "</s>"]
ENDS = {LLAMA3: "<|eot_id|>", CHATML: "<|im_end|>", GEMMA: "<end_of_turn>", MISTRAL: "</s>"}
STYLES = {"llama3": LLAMA3, "chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL, "none": None}
every_style = pytest.mark.parametrize("template", STYLES.values(), ids=STYLES.keys())


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = train_tokenizer(700, 4096)
    tokenizer.add_tokens([AddedToken(marker, special=True) for marker in MARKERS])
    return tokenizer


def use(tokenizer, template):
    tokenizer.chat_template = template
    tokenizer.eos_token = ENDS.get(template, "<|im_end|>" if template else "<|end|>")
    return ChatFormat(tokenizer)


def sentencepiece():
    """Llama-2 style: a space is put before every text that does not follow another."""
    chars = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:!?[]/0123456789\n"))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("o", "r"), ("▁", "▁")]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", *chars, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def user(text):
    return [Message("user", text)]


def strange_ids(tokenizer, text, seed=0):
    """Ids that decode to the text but are not those the tokenizer would choose, as a model's often are not."""
    chance = random.Random(seed)
    ids = []
    while text:
        length = chance.randint(1, min(4, len(text)))
        ids += tokenizer.encode(text[:length], add_special_tokens=False)
        text = text[length:]
    return ids


# --- exactness --------------------------------------------------------------------------------------------------------


@every_style
@pytest.mark.parametrize("ended", [True, False], ids=["eos", "length"])
def test_what_the_model_said_is_never_tokenised_again(byte_level, template, ended):
    chat = use(byte_level, template)
    transcript = Transcript(chat, "s")
    known = ()
    answers = ["Certainly, the answer.", "Another one!", " spaces around ", "four"]
    for turn, answer in enumerate(answers):
        system = [Message("system", "Be brief and kind.")] if turn == 0 else []
        prompt = transcript.prompt([*system, *user(f"Question {turn}?")])
        assert prompt.drift_at is None
        assert prompt.token_ids[: len(known)] == known
        ids = strange_ids(byte_level, answer, turn)
        assert turn == 2 or ids != byte_level.encode(answer, add_special_tokens=False)
        ids += [byte_level.eos_token_id] if ended else []
        transcript.add_answer(ids, answer)
        known = (*prompt.token_ids, *ids)


@every_style
def test_the_text_is_that_of_the_template(byte_level, template):
    """Decoded, the spliced prompt is the rendered conversation: no end token missing or doubled."""
    chat = use(byte_level, template)
    for end in ([byte_level.eos_token_id], []):
        transcript = Transcript(chat, "s")
        messages = []
        for turn, answer in enumerate(["Certainly.", "Another one!", "three"]):
            messages += user(f"Question {turn}?")
            prompt = transcript.prompt(messages[-1:])
            decoded, rendered = byte_level.decode(prompt.token_ids), chat.render(messages)
            if template in (MISTRAL, None):  # the space before an answer is the answer's own
                decoded, rendered = decoded.replace(" ", ""), rendered.replace(" ", "")
            assert decoded == rendered
            transcript.add_answer([*strange_ids(byte_level, answer), *end], answer)
            messages.append(Message("assistant", answer))


@every_style
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12), max_size=4))
@settings(max_examples=40, deadline=None)
def test_no_drift_whatever_is_said(byte_level, template, texts):
    transcript = Transcript(use(byte_level, template), "s")
    for text in texts:
        assert transcript.prompt(user(text + ".")).drift_at is None
        transcript.add_answer([*byte_level.encode("x" + text, add_special_tokens=False), 2], "x" + text)
    assert transcript.prompt(user("end")).drift_at is None


def test_recorded_answers_are_tokenised_once(byte_level, monkeypatch):
    transcript = Transcript(use(byte_level, CHATML), "s")
    prompt = transcript.prompt(user("Hi"))
    transcript.add_recorded_answer("Hello there.")
    monkeypatch.setattr(ChatFormat, "tokenize", lambda *_: pytest.fail("tokenised again"))
    second = transcript.prompt(user("Go on"))
    hello = tuple(byte_level.encode("Hello there.", add_special_tokens=False))
    assert second.token_ids[: len(prompt.token_ids) + len(hello)] == prompt.token_ids + hello
    assert second.drift_at is None


def test_only_new_text_is_tokenised(byte_level, monkeypatch):
    transcript = Transcript(use(byte_level, LLAMA3), "s")
    texts = []
    original = ChatFormat.tokenize_after
    monkeypatch.setattr(ChatFormat, "tokenize_after", lambda self, text: texts.append(text) or original(self, text))
    for turn in range(4):
        transcript.prompt(user(f"Question {turn}"))
        transcript.add_answer([300 + turn], f"answer {turn}")
    assert [f"Question {turn}" in text for turn, text in enumerate(texts, start=1)] == [True] * 3


@pytest.mark.parametrize("end", [(), ("</s>",)])
def test_a_sentencepiece_tokenizer(end):
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("</s>", special=True)])
    tokenizer.chat_template = MISTRAL
    chat = ChatFormat(tokenizer)
    transcript = Transcript(chat, "s")
    messages = []
    for text, answer in [("Hi there", "Hello."), ("More", "the more"), ("End", "")]:
        messages += user(text)
        prompt = transcript.prompt(messages[-1:])
        assert prompt.drift_at is None
        ids = [*tokenizer.encode(answer, add_special_tokens=False), *tokenizer.convert_tokens_to_ids(list(end))]
        transcript.add_answer(ids, answer)
        messages.append(Message("assistant", answer))
    assert chat.tokenize_after("the") == tuple(tokenizer.encode("</s>the", add_special_tokens=False)[1:])


def test_a_text_that_looks_like_a_placeholder_is_only_text(byte_level):
    from cluster.chat import _placeholders

    place = _placeholders("s", 1, [])[0]
    transcript = Transcript(use(byte_level, CHATML), "s")
    transcript.prompt(user(f"What is {place}?"))
    transcript.add_answer([300, 301], f"It is {place}.")
    assert transcript.prompt(user(place)).drift_at is None
    assert place not in _placeholders("s", 1, user(place))


def test_an_ordinary_token_is_not_taken_for_a_doubled_end(byte_level):
    """An answer that ends in a line break, before a template that begins with one."""
    byte_level.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    transcript = Transcript(ChatFormat(byte_level), "s")
    line_break = byte_level.encode("\n", add_special_tokens=False)[0]
    first = transcript.prompt(user("Hi"))
    transcript.add_answer([line_break], "\n")
    second = transcript.prompt(user("Go on")).token_ids
    assert second[len(first.token_ids) : len(first.token_ids) + 2] == (line_break, line_break)


# --- drift ------------------------------------------------------------------------------------------------------------


def test_a_template_that_drops_earlier_thinking_drifts_at_the_thought(byte_level):
    transcript = Transcript(use(byte_level, QWEN3), "s")
    first = transcript.prompt(user("Two and two?"))
    thought = "<think>\nLet me see.\n</think>\n\nFour."
    transcript.add_answer([*strange_ids(byte_level, thought), byte_level.eos_token_id], thought)
    second = transcript.prompt(user("And three?"))
    assert second.drift_at == len(first.token_ids)
    assert "Let me see" not in byte_level.decode(second.token_ids)
    assert "assistant\nFour.<|im_end|>" in byte_level.decode(second.token_ids)


def test_answers_without_thoughts_stay_exact_beside_others(byte_level):
    transcript = Transcript(use(byte_level, QWEN3), "s")
    ids = strange_ids(byte_level, "A plain answer, all the same.")
    first = transcript.prompt(user("First?"))
    transcript.add_answer([*ids, byte_level.eos_token_id], "A plain answer, all the same.")
    second = transcript.prompt(user("Second?"))
    thought = "<think>\nHm.\n</think>\n\nB."
    transcript.add_answer([*strange_ids(byte_level, thought), byte_level.eos_token_id], thought)
    third = transcript.prompt(user("Third?"))
    start = len(first.token_ids)
    assert list(third.token_ids[start : start + len(ids)]) == ids
    assert third.drift_at == len(second.token_ids)
    assert {start, start + len(ids)} <= set(third.cuts)


def test_after_a_drift_the_next_turn_goes_on_from_the_new_tokens(byte_level):
    transcript = Transcript(use(byte_level, QWEN3), "s")
    for text, answer in [("a", "<think>\nHm.\n</think>\n\nA."), ("b", "B.")]:
        prompt = transcript.prompt(user(text))
        transcript.add_answer([*byte_level.encode(answer), byte_level.eos_token_id], answer)
    assert prompt.drift_at is not None
    assert transcript.prompt(user("c")).drift_at is None


@pytest.mark.parametrize("template", [SHOUTING, FORGETFUL])
def test_a_template_that_changes_or_drops_answers_gives_its_own_text(byte_level, template):
    chat = use(byte_level, template)
    transcript = Transcript(chat, "s")
    first = transcript.prompt(user("hi"))
    transcript.add_answer([*strange_ids(byte_level, "quiet words"), byte_level.eos_token_id], "quiet words")
    second = transcript.prompt(user("go on"))
    whole = chat.render([*user("hi"), Message("assistant", "quiet words"), *user("go on")])
    assert second.token_ids == chat.tokenize(whole)
    assert second.drift_at is not None
    assert second.drift_at == len(first.token_ids) - (0 if template == SHOUTING else len(chat.tokenize("assistant\n")))


def test_a_template_that_forgets_the_beginning_drifts_there(byte_level):
    chat = use(byte_level, LAST_FOUR)
    transcript = Transcript(chat, "s")
    for turn in range(4):
        prompt = transcript.prompt(user(f"{turn} is a number"))
        assert (prompt.drift_at is None) == (turn < 2)
        if turn >= 2:
            same = "<|im_start|>" if turn == 2 else "<|im_start|>assistant\n"  # then "assistant" where "user" was
            assert prompt.drift_at == len(chat.tokenize(same))
            assert "0 is a number" not in byte_level.decode(prompt.token_ids)
        transcript.add_answer([300 + turn, byte_level.eos_token_id], byte_level.decode([300 + turn]))


# --- cuts -------------------------------------------------------------------------------------------------------------


@every_style
def test_cuts_end_the_system_part_earlier_prompts_and_answers(byte_level, template):
    chat = use(byte_level, template)
    system = Message("system", "You know all about trains and tell it in few words.")
    transcript = Transcript(chat, "s")
    first = transcript.prompt([system, *user("Where to?")])
    other = Transcript(chat, "t").prompt([system, *user("0 trains?")])
    (common,) = first.cuts
    assert other.cuts == first.cuts
    assert other.token_ids[:common] == first.token_ids[:common]
    assert "few words." in byte_level.decode(first.token_ids[:common])
    assert {"W", "0"}.isdisjoint(byte_level.decode(first.token_ids[:common]))
    after = byte_level.decode(first.token_ids[common:])
    assert after.lstrip().startswith("Where")
    transcript.add_answer([300, 301, 302, byte_level.eos_token_id], byte_level.decode([300, 301, 302]))
    second = transcript.prompt(user("Really?"))
    start = len(first.token_ids)
    assert second.cuts == (common, start, start + 3)
    transcript.add_answer([303], byte_level.decode([303]))
    third = transcript.prompt(user("Why?"))
    assert third.cuts == (
        common,
        start,
        start + 3,
        len(second.token_ids),
    )  # an answer of one token ends where it starts


def test_different_system_messages_share_no_more_than_the_template(byte_level):
    chat = use(byte_level, LLAMA3)
    a = Transcript(chat, "a").prompt([Message("system", "Red"), *user("x")])
    b = Transcript(chat, "b").prompt([Message("system", "Blue"), *user("x")])
    common = next(i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y)
    assert common < min(a.cuts[0], b.cuts[0])


# --- templates with gaps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [GEMMA, MISTRAL])
def test_system_text_goes_to_the_head_of_the_user_message(byte_level, template):
    chat = use(byte_level, template)
    text = chat.render([Message("system", "Be brief."), *user("Hi")])
    assert text == chat.render(user("Be brief.\n\nHi"))


def test_system_text_that_is_silently_dropped_is_noticed(byte_level):
    byte_level.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }};{% endfor %}"
    assert ChatFormat(byte_level).render([Message("system", "Be brief."), *user("Hi")]) == "Be brief.\n\nHi;"


@pytest.mark.parametrize("template", [GEMMA, MISTRAL])
def test_tool_results_become_user_messages_where_there_are_no_tools(byte_level, template):
    chat = use(byte_level, template)
    messages = [*user("Weather?"), Message("assistant", "call"), Message("tool", "sunny")]
    assert chat.render(messages) == chat.render([*messages[:2], *user("sunny")])
    if template == GEMMA:
        both = chat.render([*messages, *user("And?")])
        assert both == chat.render([*messages[:2], *user("sunny\n\nAnd?")])


def test_tool_and_system_messages_stay_where_they_are_known(byte_level):
    text = use(byte_level, CHATML).render(
        [Message("system", "S"), *user("U"), Message("assistant", "A"), Message("tool", "T")]
    )
    assert [f"<|im_start|>{role}\n" in text for role in ("system", "user", "assistant", "tool")] == [True] * 4


def test_a_tokenizer_without_a_template_gets_a_plain_one(byte_level):
    chat = use(byte_level, None)
    text = chat.render([Message("system", "S"), *user("U"), Message("assistant", "A"), *user("V")])
    assert text == "<|begin|>System: S\nUser: U\nAssistant: A<|end|>\nUser: V\nAssistant:"


def test_a_refused_prompt_raises_and_leaves_no_trace(byte_level):
    byte_level.chat_template = (
        "{% for m in messages %}{% if 'forbidden' in m['content'] %}{{ raise_exception('no such word') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    transcript = Transcript(ChatFormat(byte_level), "s")
    with pytest.raises(TemplateError, match=r"refuses messages of roles user: no such word"):
        transcript.prompt(user("forbidden"))
    with pytest.raises(ValueError, match="no prompt to answer"):
        transcript.add_answer([1], "x")
    assert transcript.prompt(user("allowed")).drift_at is None


# --- a session's life -------------------------------------------------------------------------------------------------


def test_a_prompt_without_an_answer_leaves_no_trace(byte_level):
    transcript = Transcript(use(byte_level, CHATML), "s")
    once = transcript.prompt(user("Hi"))
    assert transcript.prompt(user("Hi")) == once
    transcript.add_answer([300], "x")
    with pytest.raises(ValueError, match=r"session s.*call prompt"):
        transcript.add_answer([300], "x")


@every_style
def test_a_transcript_survives_a_restart(byte_level, template):
    chat = use(byte_level, template)
    transcript = Transcript(chat, "s")
    for turn in range(3):
        transcript.prompt([*([Message("system", "S")] if turn == 0 else []), *user(f"{turn}?")])
        if turn == 1:
            transcript.add_recorded_answer("A recorded one.")
        else:
            transcript.add_answer([*strange_ids(byte_level, "An answer."), byte_level.eos_token_id], "An answer.")
    again = Transcript(chat, "s")
    again.extend(transcript.turns)
    assert again.prompt(user("Next?")) == transcript.prompt(user("Next?"))


def test_a_fork_goes_its_own_way(byte_level):
    transcript = Transcript(use(byte_level, CHATML), "s")
    transcript.prompt(user("Hi"))
    fork = transcript.fork()
    transcript.add_answer([300], byte_level.decode([300]))
    fork.add_answer([301, 302], byte_level.decode([301, 302]))
    ours, theirs = transcript.prompt(user("So?")).token_ids, fork.prompt(user("So?")).token_ids
    assert 300 in ours
    assert 301 not in ours
    assert 301 in theirs
    assert 300 not in theirs
