"""Models from folders: what is read from them, what is said of broken ones, and that equal models are named alike."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from actors.engine import fingerprint
from actors.engine.engine import Engine
from actors.engine.loading import LoadedModel, ModelError, find_folder, load_tokenizer
from actors.engine.turns import EngineConfig
from tests.engine.harness import Owner
from tests.engine.models import CONFIGS, build, loaded, make_tokenizer, random_prompt, stock_answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = build(CONFIGS["llama"]())
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return


def test_an_engine_from_a_folder(folder: Path) -> None:
    engine = Engine(EngineConfig(model=str(folder), kv_tokens=128, block_tokens=4, chunk_tokens=16, device="cpu"))
    prompt = random_prompt(20, 1)
    owner = Owner(engine)
    owner.add("t", prompt)
    assert owner.run()["t"].token_ids == stock_answer("llama", prompt, 8)


def test_what_is_known_of_a_model(folder: Path) -> None:
    model = LoadedModel.load(str(folder), device="cpu")
    assert (model.dtype, model.vocab_size, model.context_window) == ("float32", 128, 256)
    assert model.eos_token_ids == (2, 9)
    assert model.kv_bytes_per_token == 4 * 2 * (16 + 16) * 4
    assert len(model.layers) == len(model.rotations) == 4
    assert model.tokenizer.decode([3]) == "!"
    assert model.key_space("tenant").root() != model.key_space().root()
    half = LoadedModel.load(str(folder), dtype="bfloat16", device="cpu")
    assert half.dtype == "bfloat16"
    assert half.kv_bytes_per_token == model.kv_bytes_per_token // 2
    assert half.fingerprint == model.fingerprint
    assert half.key_space().root() != model.key_space().root()
    assert load_tokenizer(str(folder)).get_vocab() == model.tokenizer.get_vocab()


def test_context_windows() -> None:
    assert loaded("llama-yarn").context_window == 256
    assert loaded("gpt-neox").context_window == 2048
    config = CONFIGS["llama-yarn"]()
    config.max_position_embeddings = 64
    assert LoadedModel.from_model(build(config)).context_window == 256


def test_a_missing_folder_is_said_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    for name in (str(tmp_path / "nowhere"), "./nowhere", "~/nowhere-at-all", "a/b/c", "nowhere", f"{tmp_path}/x/y"):
        with pytest.raises(ModelError, match="check the path"):
            find_folder(name)
    assert time.monotonic() - began < 1


def test_a_hub_id_that_cannot_be_reached() -> None:
    with pytest.raises(ModelError, match=r"hub cannot be reached|cannot get"):
        find_folder("nobody-here/no-such-model")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="give the folder"):
        find_folder(str(folder / "config.json"))


def _break_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_broken_folders(copy: Path) -> None:
    def refuse(advice: str) -> None:
        with pytest.raises(ModelError, match=advice) as caught:
            LoadedModel.load(str(copy), device="cpu")
        assert "\n" not in str(caught.value)

    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    _break_config(copy, model_type="no-such-type")
    refuse("unsupported architecture")
    _break_config(copy, model_type="vit", architectures=["ViTModel"])
    refuse("no causal language model")
    _break_config(copy, model_type="llama")
    save_file({k: v for k, v in tensors.items() if "layers.3.self_attn" not in k}, weights, {"format": "pt"})
    refuse("4 weights are missing")
    weights.write_bytes(b"nonsense")
    refuse("cannot be loaded")
    weights.unlink()
    refuse("no weights")
    (copy / "config.json").unlink()
    refuse(r"no config\.json")


def test_a_folder_without_tokenizer(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        LoadedModel.load(str(copy), device="cpu")


def test_unknown_devices_and_types(folder: Path) -> None:
    with pytest.raises(ModelError, match="unknown to torch"):
        LoadedModel.load(str(folder), device="abacus")
    with pytest.raises(ModelError, match="not supported: use auto or one of"):
        LoadedModel.load(str(folder), dtype="int3", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            LoadedModel.load(str(folder), device="cuda")


# --- fingerprints -----------------------------------------------------------------------------------------------------


def _fingerprint(folder: Path) -> str:
    return fingerprint.fingerprint_files(tf.AutoConfig.from_pretrained(folder), sorted(folder.glob("*.safetensors")))


def test_equal_models_have_equal_names_in_every_process(folder: Path, copy: Path) -> None:
    script = (
        "import sys, pathlib, transformers; from actors.engine import fingerprint as f; p = pathlib.Path(sys.argv[1]);"
        "print(f.fingerprint_files(transformers.AutoConfig.from_pretrained(p), list(p.glob('*.safetensors'))))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(copy)], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == _fingerprint(folder)


@pytest.mark.parametrize("whole_bytes", [1 << 30, 0], ids=["whole", "sampled"])
def test_other_weights_or_settings_have_other_names(
    folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", whole_bytes)
    original = _fingerprint(folder)
    assert _fingerprint(copy) == original
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.01
    save_file(tensors, weights, {"format": "pt"})
    changed = _fingerprint(copy)
    assert changed != original
    shutil.copy(folder / "model.safetensors", weights)
    assert _fingerprint(copy) == original
    _break_config(copy, rms_norm_eps=1e-3)
    assert _fingerprint(copy) not in (original, changed)


def test_models_in_memory_are_told_apart() -> None:
    names = [LoadedModel.from_model(build(CONFIGS["llama"](), seed=seed)).fingerprint for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert names[0] != loaded("qwen2").fingerprint


def test_tokenizers_are_told_apart(folder: Path, copy: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    name = fingerprint.fingerprint_tokenizer(tokenizer, folder)
    assert name == fingerprint.fingerprint_tokenizer(tokenizer, copy)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text().replace('"!"', '"¡¡"'))
    assert name != fingerprint.fingerprint_tokenizer(tokenizer, copy)
    assert fingerprint.fingerprint_tokenizer(None, None) == "none"
    assert len(fingerprint.fingerprint_tokenizer(tokenizer, None)) == 64
