"""What benchmarks are asked with is checked at the door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.bench import options as module
from cluster.bench.options import BenchOptions
from cluster.config import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", "", "--model"),
        ("dtype", "int8", "float32"),
        ("device", "tpu", "cuda"),
        ("num_threads", -1, "all cores"),
        ("repeats", 0, "at least 1"),
        ("scratch", "s3://bucket/x", "folder of this machine"),
        ("data", "/no/such/folder", "--data"),
    ],
)
def test_what_cannot_be_is_told(field: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BenchOptions(**{"model": "x", field: value})  # type: ignore[arg-type]


def test_threads_are_never_none() -> None:
    assert BenchOptions(model="x").threads >= 1
    assert BenchOptions(model="x", num_threads=3).threads == 3


@pytest.mark.parametrize(
    ("stored", "native", "computed"),
    [
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),
        ("float16", True, "float32"),
        ("float32", True, "float32"),
    ],
)
def test_auto_is_the_stored_type_where_the_cpu_computes_it(
    stored: str, native: bool, computed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": stored}))
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: native)
    choice = BenchOptions(model=str(tmp_path), device="cpu").dtype_choice
    assert choice.dtype == computed
    assert choice.reason


def test_a_type_asked_for_is_taken(tmp_path: Path) -> None:
    assert BenchOptions(model=str(tmp_path), dtype="bfloat16").computed_dtype == "bfloat16"


def test_scratch_is_fresh_and_goes_away(tmp_path: Path) -> None:
    options = BenchOptions(model="x", scratch=str(tmp_path / "new"))
    with options.scratch_folder("a") as one, options.scratch_folder("a") as other:
        assert one != other
        assert one.is_absolute()
        (one / "file").write_bytes(b"x")
    assert not list((tmp_path / "new").iterdir())


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="--scratch"),
        BenchOptions(model="x", scratch=str(tmp_path / "file")).scratch_folder("a"),
    ):
        pass


def test_the_setup_says_what_one_must_know(small_model: Path) -> None:
    setup = BenchOptions(model=str(small_model)).setup(chunk_tokens=7)
    assert setup["dtype"] == "float32"
    assert setup["chunk_tokens"] == 7
    assert {"torch", "ray"} <= setup["versions"].keys()
    json.dumps(setup)
