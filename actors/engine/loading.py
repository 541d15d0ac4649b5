"""From a folder or hub id to a model the engine can run: load, find its rotations, prove it, and describe it.

The proof: the engine's own runner (pages, ragged chunks, decodes) against the stock model on random tokens. A model for
which the two differ is refused, whatever the reason: a wrong answer is worse than none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from actors.engine.adapters import adapt
from actors.engine.compat import UnsupportedModel, check_against_stock, refuse_known, stock_logits
from actors.engine.fingerprint import fingerprint_files, fingerprint_tokenizer, fingerprint_weights
from actors.engine.hooks import ATTENTION_NAME, skip_identity_rotations, wrap_rotary
from actors.engine.linear import speed_up_few_rows
from actors.engine.probe import LayerFacts, ProbeError, probe
from actors.engine.rope import Rotation
from actors.engine.tokenizer import ModelError, find_folder, first_line, load_tokenizer, tokenizer_in
from storage.format import LayerShape
from storage.keys import KeySpace

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


__all__ = ["LoadedModel", "ModelError", "UnsupportedModel", "find_folder", "load_tokenizer"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready for the engine. The model object is changed by loading: it serves engines, not `generate`."""

    model: Any
    tokenizer: Any
    """None where the model was given without one."""
    rotations: tuple[Rotation | None, ...]
    """Per layer; None where it does not rotate."""
    layers: tuple[LayerShape, ...]
    context_window: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    tokenizer_fingerprint: str
    dtype: str
    """As the chunk format writes it: float32, bfloat16 or float16."""
    torch_dtype: torch.dtype
    device: torch.device

    @classmethod
    def load(cls, name: str, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
        """From a local folder or a hub id. ModelError where that is impossible, UnsupportedModel where it is unsafe."""
        folder = find_folder(name)
        where = _pick_device(device)
        config = _load_config(folder)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise ModelError(f"no weights (*.safetensors) in {folder}: convert them with save_pretrained, or copy them")
        model = _load_weights(folder, config, _pick_dtype(dtype))
        try:
            model = model.to(where)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{name} does not fit into the memory of {where}: take a smaller model or dtype"
            ) from error
        tokenizer = tokenizer_in(folder)
        return cls.from_model(model, tokenizer, fingerprint=fingerprint_files(config, weights), tokenizer_folder=folder)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        fingerprint: str | None = None,
        tokenizer_folder: Path | None = None,
    ) -> LoadedModel:
        """From a model object in memory, which is changed and from now on the engine's. UnsupportedModel."""
        model.eval()
        refuse_known(model)
        fingerprint = fingerprint or fingerprint_weights(model)
        context_window = _context_window(model.config)
        adapt(model)
        facts = _find_facts(model, context_window)
        return cls(
            model=model,
            tokenizer=tokenizer,
            rotations=tuple(fact.rotation for fact in facts),
            layers=tuple(LayerShape(num_kv_heads=f.num_kv_heads, k_dim=f.k_dim, v_dim=f.v_dim) for f in facts),
            context_window=context_window,
            vocab_size=model.config.get_text_config().vocab_size,
            eos_token_ids=_eos_token_ids(model),
            fingerprint=fingerprint,
            tokenizer_fingerprint=fingerprint_tokenizer(tokenizer, tokenizer_folder),
            dtype=str(model.dtype).removeprefix("torch."),
            torch_dtype=model.dtype,
            device=model.device,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        channels = sum(layer.num_kv_heads * (layer.k_dim + layer.v_dim) for layer in self.layers)
        return channels * self.torch_dtype.itemsize

    def key_space(self, salt: str = "") -> KeySpace:
        """What must be equal for others to use the chunks of this model. `salt`: one per tenant."""
        return KeySpace(model=self.fingerprint, tokenizer=self.tokenizer_fingerprint, dtype=self.dtype, salt=salt)


def _find_facts(model: Any, context_window: int) -> list[LayerFacts]:
    """Switches the model to the engine's hooks, finds its rotations, and compares it with what it was before."""
    rotaries = wrap_rotary(model, pin_position=context_window - 1)
    try:
        expected = stock_logits(model, rotaries)
        model.set_attn_implementation(ATTENTION_NAME)
        speed_up_few_rows(model)
        skip_identity_rotations(model)
        with torch.inference_mode():
            facts = probe(model, rotaries, context_window)
    except ProbeError as error:
        raise UnsupportedModel(model, str(error)) from error
    except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError, NotImplementedError) as error:
        # Foreign code under a foreign cache and attention: whatever it stumbles over, it cannot run here.
        raise UnsupportedModel(
            model, f"it cannot run on the engine's cache ({type(error).__name__}: {error})"
        ) from error
    check_against_stock(model, facts, expected)
    return facts


def _load_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ModelError(f"no config.json in {folder}: this is not a transformers model folder")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{folder}: unsupported architecture or damaged config.json ({first_line(error)})") from error


def _load_weights(folder: Path, config: Any, dtype: torch.dtype | str) -> Any:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except ValueError as error:
        raise ModelError(
            f"{folder}: unsupported architecture {config.model_type!r}: transformers has no causal language model of"
            f" this type ({first_line(error)})"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: its weights cannot be loaded ({first_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing ({missing[0]}, …), the model would answer at random: the"
            " download is incomplete, or config.json belongs to another model"
        )
    return model


def _pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is unknown to torch: use auto, cpu or cuda") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch sees no CUDA device here; use auto or cpu")
    return where


def _pick_dtype(dtype: str) -> torch.dtype | str:
    if dtype != "auto" and dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported: use auto or one of {', '.join(_DTYPES)}")
    return _DTYPES.get(dtype, "auto")


def _context_window(config: Any) -> int:
    """Positions the model knows; YaRN stretches its original window."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    window = next((int(v) for name in names if isinstance(v := getattr(text, name, None), int)), 2048)
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        window = max(window, math.floor(rope["original_max_position_embeddings"] * rope.get("factor", 1.0)))
    return window


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    """Those of the generation config and of the config, which each may hold one, several or none."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config.get_text_config()):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return tuple(sorted(found))
