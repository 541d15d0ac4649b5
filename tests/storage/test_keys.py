from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import storage.keys
from storage.keys import KeySpace, chain, self_test

SPACE = KeySpace(model="m", tokenizer="t", dtype="bfloat16")
ROOT = SPACE.root()

token_lists = st.lists(st.integers(0, 200_000), max_size=60)


def test_self_test_passes_here():
    self_test()


def test_self_test_notices_another_hash(monkeypatch):
    monkeypatch.setattr(storage.keys, "_LINK_TAG", b"something else")
    with pytest.raises(RuntimeError, match="must not share a store"):
        self_test()


SCRIPT = """
import json
from storage.keys import KeySpace, chain, self_test
self_test()
root = KeySpace(model="m", tokenizer="t", dtype="bfloat16").root()
print(json.dumps([root, chain(root, range(50, 0, -1), 16, cuts={5, 7, 20, 33}, context_start=9)]))
"""


@pytest.mark.parametrize("seed", ["0", "1", "4242", "random"])
def test_every_process_computes_the_same(seed):
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    here = chain(ROOT, range(50, 0, -1), 16, cuts={33, 20, 7, 5}, context_start=9)
    assert json.loads(ran.stdout) == [ROOT, [list(mark) for mark in here]]


@pytest.mark.parametrize("field", ["model", "tokenizer", "dtype", "layout", "codec", "salt"])
def test_every_field_of_the_space_matters(field):
    assert replace(SPACE, **{field: "other"}).root() != ROOT


def test_fields_do_not_run_into_each_other():
    left = KeySpace(model="a", tokenizer="bc", dtype="float32")
    right = KeySpace(model="ab", tokenizer="c", dtype="float32")
    assert left.root() != right.root()


def test_marks_stand_at_multiples_cuts_and_the_end():
    ends = [end for end, _ in chain(ROOT, range(10), 4, cuts=(6, 4, 0, -1, 11, 6))]
    assert ends == [4, 6, 8, 10]


@given(tokens=token_lists, chunk_tokens=st.integers(1, 20), cuts=st.sets(st.integers(-2, 70)))
@settings(max_examples=60, deadline=None)
def test_a_key_does_not_depend_on_the_other_marks(tokens, chunk_tokens, cuts):
    marks = dict(chain(ROOT, tokens, chunk_tokens, cuts))
    expected = set(range(chunk_tokens, len(tokens) + 1, chunk_tokens)) | {len(tokens)} | {c for c in cuts if c > 0}
    assert list(marks) == sorted(end for end in expected if 0 < end <= len(tokens))
    for end, key in marks.items():
        assert dict(chain(ROOT, tokens[:end], chunk_tokens))[end] == key


@given(tokens=st.lists(st.integers(0, 9), min_size=1, max_size=30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_key_depends_on_every_token_before_it_and_none_after(tokens, data):
    position = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[position] += 1
    every = range(len(tokens) + 1)
    for (end, key), (_, other_key) in zip(chain(ROOT, tokens, 7, every), chain(ROOT, other, 7, every)):
        assert (key == other_key) == (end <= position)


def test_a_key_depends_on_root_context_and_chunk_size():
    keys = [
        chain(ROOT, range(8), 8)[-1],
        chain(ROOT, range(8), 4)[-1],
        chain(ROOT, range(8), 8, context_start=1)[-1],
        chain(replace(SPACE, salt="tenant").root(), range(8), 8)[-1],
    ]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("tokens", [(1, 2, 3), [1, 2, 3], np.array([1, 2, 3], dtype=np.uint16), range(1, 4)])
def test_any_sequence_of_integers(tokens):
    assert chain(ROOT, tokens, 2) == chain(ROOT, [1, 2, 3], 2)


def test_no_tokens_no_marks():
    assert chain(ROOT, [], 4, cuts=(0, 3)) == []


@pytest.mark.parametrize("tokens", [[-1], [1.5], ["a"], [[1, 2]], [True]])
def test_refuses_what_is_no_token(tokens):
    with pytest.raises(ValueError, match="token ids"):
        chain(ROOT, tokens, 4)


def test_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="chunk_tokens"):
        chain(ROOT, [1], 0)
    with pytest.raises(ValueError, match="context_start"):
        chain(ROOT, [1], 4, context_start=-1)
    with pytest.raises(ValueError, match="hexadecimal"):
        chain("not hex", [1], 4)
