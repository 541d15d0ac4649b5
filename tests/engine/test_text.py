"""Streamed text equals the tokenizer's own decoding, however tokens cut it, and ends exactly before a stop string."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actors.engine.text import MAX_PENDING, TextStream, Vocabulary

torch.set_num_threads(1)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's a nice day, isn't it? Yes !",
    "  Leading spaces,   many   spaces\n\nnew lines\tand tabs.",
    "Émile naïvely cafés Zürich 你好，世界。 今天天气很好 🙂🙂 👩‍👩‍👧 नमस्ते мир",
] * 4
SPECIAL = ["<s>", "</s>", "<pad>"]


def wrap(backend):
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("<two words>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def byte_level(add_prefix_space=False):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    return wrap(backend)


def sentencepiece(decoder_end, prepend):
    """Llama-2 and Gemma style: spaces are U+2581, characters out of vocabulary are byte tokens."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    chars = sorted(set("".join(CORPUS).replace(" ", "▁")) & set("▁abcdefghijklmnopqrstuvwxyz.,'!?世界TI"))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("o", "r"), ("▁", "▁"), ("i", "s"), ("▁", "a"), ("世", "界")]
    merged = [a + b for a, b in merges]
    vocab = {token: i for i, token in enumerate(["<unk>", *byte_tokens, *chars, *merged])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    start = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(start + decoder_end)
    return wrap(backend)


def metaspace():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return wrap(backend)


def mixed_byte_level():
    """Byte-level, but with another decoder around it: taken for a tokenizer of unknown kind."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return tokenizer


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_level_prefix_space": byte_level(add_prefix_space=True),
    "llama2": sentencepiece([decoders.Strip(" ", 1, 0)], prepend=True),
    "gemma": sentencepiece([], prepend=False),
    "metaspace": metaspace(),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
texts = st.text(st.one_of(st.sampled_from("the 你好世界🙂👩‍é▁.\n '"), st.characters(codec="utf-8")), max_size=40)


def decode(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(tokenizer, token_ids, stop=()):
    """The stream after all tokens and its pieces, the last of them from `finish`."""
    text_stream = TextStream(tokenizer, stop)
    pieces = [text_stream.push(token_id) for token_id in token_ids]
    return text_stream, [*pieces, text_stream.finish()]


def test_kinds_are_recognised():
    kinds = {name: Vocabulary.of(tokenizer).byte_level for name, tokenizer in TOKENIZERS.items()}
    assert kinds == {
        "byte_level": True,
        "byte_level_prefix_space": True,
        "llama2": False,
        "gemma": False,
        "metaspace": False,
    }


@every_tokenizer
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_text_is_what_the_tokenizer_decodes(tokenizer, text):
    token_ids = tokenizer.encode(text)
    text_stream, pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == text_stream.text == decode(tokenizer, token_ids)
    assert text_stream.num_tokens_kept == len(token_ids)


@every_tokenizer
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_random_tokens_too(tokenizer, data):
    """Invalid bytes, special tokens in the middle, ids the vocabulary does not have."""
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=MAX_PENDING - 1))
    text_stream, pieces = stream(tokenizer, token_ids)
    known = [i for i in token_ids if i < len(tokenizer)]
    assert "".join(pieces) == text_stream.text == decode(tokenizer, known)


@pytest.mark.parametrize("name", ["byte_level", "llama2", "gemma"])
@given(data=st.binary(max_size=MAX_PENDING - 1))
@settings(max_examples=200, deadline=None)
def test_random_bytes_too(name, data):
    tokenizer = TOKENIZERS[name]
    if name == "byte_level":
        byte_ids = tokenizer.convert_tokens_to_ids(sorted(pre_tokenizers.ByteLevel.alphabet()))
    else:
        byte_ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    token_ids = [byte_ids[byte] for byte in data]
    assert "".join(stream(tokenizer, token_ids)[1]) == decode(tokenizer, token_ids)


@every_tokenizer
def test_words_come_as_they_are_made(tokenizer):
    token_ids = tokenizer.encode("the fox is here. the end", add_special_tokens=False)
    text_stream = TextStream(tokenizer)
    for num_tokens, token_id in enumerate(token_ids, start=1):
        text_stream.push(token_id)
        assert text_stream.text == decode(tokenizer, token_ids[:num_tokens])


@pytest.mark.parametrize("name", ["byte_level", "llama2", "gemma"])
def test_characters_are_never_split(name):
    text = "a🙂b你𝄞c"
    token_ids = TOKENIZERS[name].encode(text, add_special_tokens=False)
    assert len(token_ids) > len(text)
    _, pieces = stream(TOKENIZERS[name], token_ids)
    assert "�" not in "".join(pieces)
    assert sum(piece != "" for piece in pieces) >= 3


def test_a_byte_level_character_comes_with_its_last_byte():
    tokenizer = TOKENIZERS["byte_level"]
    text_stream = TextStream(tokenizer)
    assert [text_stream.push(i) for i in tokenizer.encode("𝄞")] == ["", "", "", "𝄞"]


def test_invalid_bytes_do_not_hold_the_text_back():
    tokenizer = TOKENIZERS["byte_level"]
    lead, ascii_a = tokenizer.convert_tokens_to_ids(["ð", "a"])
    text_stream = TextStream(tokenizer)
    assert [text_stream.push(i) for i in (lead, lead, ascii_a)] == ["", "�", "�a"]
    assert TextStream(tokenizer).push(ascii_a) == "a"
    assert stream(tokenizer, [ascii_a, lead])[1] == ["a", "", "�"]


@pytest.mark.parametrize("name", ["llama2", "gemma"])
def test_a_long_run_of_byte_tokens_comes_in_parts(name):
    """Every character of three bytes: the bound falls inside one, which must still come whole."""
    tokenizer = TOKENIZERS[name]
    text = "ሰላም" * 40
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    text_stream, pieces = stream(tokenizer, token_ids)
    assert text_stream.text.strip() == text
    assert len(max(pieces, key=len)) <= MAX_PENDING
    assert sum(piece != "" for piece in pieces) >= 3


def test_decoding_cost_does_not_grow(monkeypatch):
    tokenizer = TOKENIZERS["llama2"]
    token_ids = tokenizer.encode("the end is near. " * 300, add_special_tokens=False)
    lengths = []
    original = type(tokenizer).decode

    def recording(self, ids, **options):
        lengths.append(len(ids))
        return original(self, ids, **options)

    text_stream = TextStream(tokenizer)
    monkeypatch.setattr(type(tokenizer), "decode", recording)
    for token_id in token_ids:
        text_stream.push(token_id)
    assert max(lengths) <= 3
    assert len(lengths) <= 2 * len(token_ids)


def test_a_byte_level_tokenizer_of_unknown_kind_is_decoded_all_the_same():
    tokenizer = mixed_byte_level()
    assert not Vocabulary.of(tokenizer).byte_level
    token_ids = tokenizer.encode("a🙂b 你𝄞 c")
    assert "".join(stream(tokenizer, token_ids)[1]) == decode(tokenizer, token_ids) == "a🙂b 你𝄞 c"


def test_special_tokens_are_silent_and_count():
    tokenizer = TOKENIZERS["llama2"]
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    word = tokenizer.encode("the", add_special_tokens=False)
    text_stream, pieces = stream(tokenizer, [bos, *word, eos, *word])
    assert "".join(pieces) == "the the"
    assert text_stream.num_tokens_kept == 2 + 2 * len(word)


# --- stop strings -----------------------------------------------------------------------------------------------------


def first_stop(text, stop):
    """Character by character: where the first stop string to be complete begins."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return min(starts)
    return None


@every_tokenizer
@given(
    text=st.text("the is世🙂.\n", max_size=40),
    stop=st.lists(st.text("the is世🙂.", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_cut_where_they_begin(tokenizer, text, stop):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = decode(tokenizer, token_ids)
    text_stream, pieces = stream(tokenizer, token_ids, tuple(stop))
    cut = first_stop(decoded, stop)
    assert text_stream.stopped == (cut is not None)
    assert "".join(pieces) == text_stream.text == decoded[:cut]


@every_tokenizer
@given(text=st.text("the is世🙂.\n", max_size=40), stop=st.text("the is世🙂.", min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_tokens_kept_lie_before_the_cut(tokenizer, text, stop):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    text_stream, _ = stream(tokenizer, token_ids, (stop,))
    if not text_stream.stopped:
        assert text_stream.num_tokens_kept == len(token_ids)
        return
    kept = text_stream.num_tokens_kept
    certain = re.sub("�+$", "", decode(tokenizer, token_ids[:kept]))
    assert text_stream.text.startswith(certain)
    assert decode(tokenizer, token_ids[: kept + 1]) != text_stream.text or kept == len(token_ids)


def test_a_stop_string_across_token_borders():
    tokenizer = TOKENIZERS["byte_level"]
    letters = tokenizer.convert_tokens_to_ids(list("xENDy"))
    text_stream = TextStream(tokenizer, ("END",))
    assert [text_stream.push(i) for i in letters] == ["x", "", "", "", ""]
    assert text_stream.stopped
    assert (text_stream.text, text_stream.num_tokens_kept) == ("x", 1)
    assert text_stream.finish() == ""


def test_text_that_only_looked_like_a_stop_string_comes_later():
    tokenizer = TOKENIZERS["byte_level"]
    letters = tokenizer.convert_tokens_to_ids(list("xENENx"))
    text_stream = TextStream(tokenizer, ("END",))
    assert [text_stream.push(i) for i in letters] == ["x", "", "", "EN", "", "ENx"]
    assert stream(tokenizer, letters[:3], ("END",))[1] == ["x", "", "", "EN"]


def test_a_token_that_reaches_into_the_stop_string_is_not_kept():
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("over the lazy", add_special_tokens=False)
    text_stream, _ = stream(tokenizer, token_ids, ("e l",))
    assert text_stream.text == "over th"
    before = decode(tokenizer, token_ids[: text_stream.num_tokens_kept])
    assert "over th".startswith(before)
    assert len(before) < len("over th") < len(decode(tokenizer, token_ids[: text_stream.num_tokens_kept + 1]))


@pytest.mark.parametrize("name", ["llama2", "gemma"])
def test_tokens_kept_are_exact_inside_a_run_of_byte_tokens(name):
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "🙂é🙃".encode()])
    text_stream, _ = stream(tokenizer, token_ids, ("🙃",))
    assert (text_stream.text, text_stream.num_tokens_kept) == ("🙂é", 6)


def test_a_stop_string_completed_by_finish():
    tokenizer = TOKENIZERS["gemma"]
    token_ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "🙂".encode()])
    text_stream, pieces = stream(tokenizer, token_ids, ("🙂",))
    assert text_stream.stopped
    assert pieces == [""] * 5
    assert text_stream.num_tokens_kept == 0
