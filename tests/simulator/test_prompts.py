"""Prompts told by blocks, against the same prompts as lists of tokens."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.simulator.prompts import EMPTY, Prompt, PromptWriter

Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["new", "grown", "cut"]), st.integers(0, 30), st.integers(0, 40)), max_size=25
)


def num_same(one: list[int], two: list[int]) -> int:
    pairs = list(zip(one, two))
    return next((index for index, (left, right) in enumerate(pairs) if left != right), len(pairs))


@given(STEPS, st.integers(1, 9))
def test_blocks_are_equal_where_tokens_are(steps: list[Step], size: int) -> None:
    writer, tokens = PromptWriter(size), count()
    known: list[tuple[Prompt, list[int]]] = [(EMPTY, [])]
    for verb, which, num_tokens in steps:
        prompt, text = known[which % len(known)]
        if verb == "new":
            known.append((writer.new(num_tokens), [next(tokens) for _ in range(num_tokens)]))
        elif verb == "grown":
            known.append((writer.grown(prompt, num_tokens), [*text, *(next(tokens) for _ in range(num_tokens))]))
        else:
            known.append((writer.cut(prompt, num_tokens), text[:num_tokens]))
    for prompt, text in known:
        assert prompt.num_tokens == len(text)
        assert len(prompt.blocks) == -(-len(text) // size)
        for other, other_text in known:
            shorter = min(len(text), len(other_text)) // size
            same = num_same(list(prompt.blocks), list(other.blocks))
            assert min(same, shorter) == num_same(text, other_text) // size


@pytest.mark.parametrize(
    ("history", "new", "output", "left", "kept"),
    [
        (40, 10, 14, 50, 2),  # it just fits
        (40, 10, 15, 32, 0),  # half a window is left
        (20, 40, 10, 40, 0),  # but all that is new
        (20, 10, 60, 30, 1),  # nothing to drop: half a window is not full
        (0, 90, 10, 90, 0),  # there is no history to drop
    ],
)
def test_a_window_of_64_tokens(history: int, new: int, output: int, left: int, kept: int) -> None:
    writer = PromptWriter(16)
    before = writer.new(history)
    prompt = writer.windowed(before, new, output, 64)
    assert prompt.num_tokens == left
    assert num_same(list(before.blocks), list(prompt.blocks)) == kept
    assert writer.windowed(before, new, output, 0).num_tokens == history + new


def test_a_block_has_a_token() -> None:
    with pytest.raises(ValueError, match="block_tokens is 0"):
        PromptWriter(0)
